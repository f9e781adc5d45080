#include "aten.h"

#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace fastvae::aten {
namespace {

// A tensor is a handle: what is constant of it says nothing about its numbers, but ATen's out-functions want one that
// may be exchanged.
template <typename Function>
const at::Tensor& into(const at::Tensor& out, Function&& function) {
  at::Tensor handle = out;
  function(handle);
  return out;
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::zeros(sizes, options); }

at::Tensor ones(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::ones(sizes, options); }

at::Tensor eye(int64_t rows, const at::TensorOptions& options) { return at::eye(rows, options); }

at::Tensor empty_like(const at::Tensor& tensor) { return at::empty_like(tensor); }

at::Tensor zeros_like(const at::Tensor& tensor) { return at::zeros_like(tensor); }

at::Tensor stack(at::TensorList tensors) { return at::stack(tensors); }

at::Tensor cat(at::TensorList tensors) { return at::cat(tensors); }

at::Tensor from_blob(void* data, at::IntArrayRef sizes, const std::function<void(void*)>& give_back,
                     const at::TensorOptions& options) {
  return at::from_blob(data, sizes, give_back, options);
}

const at::Tensor& mm_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  return into(out, [&](at::Tensor& to) { at::mm_out(to, a, b); });
}

const at::Tensor& bmm_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  return into(out, [&](at::Tensor& to) { at::bmm_out(to, a, b); });
}

const at::Tensor& baddbmm_out(const at::Tensor& out, const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) {
  return into(out, [&](at::Tensor& to) { at::baddbmm_out(to, c, a, b); });
}

const at::Tensor& mul_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  return into(out, [&](at::Tensor& to) { at::mul_out(to, a, b); });
}

const at::Tensor& sub_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  return into(out, [&](at::Tensor& to) { at::sub_out(to, a, b); });
}

const at::Tensor& sum_out(const at::Tensor& out, const at::Tensor& tensor, int64_t dim, bool keepdim) {
  return into(out, [&](at::Tensor& to) { at::sum_out(to, tensor, dim, keepdim); });
}

}  // namespace fastvae::aten
