// The functions of ATen that our files call, declared again. ATen's own headers of functions (ATen/ops/*.h) bring its
// whole context along, 5 seconds of every file that includes one; a Tensor with its methods takes 3.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace fastvae::aten {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor ones(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor eye(int64_t rows, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& tensor);
at::Tensor zeros_like(const at::Tensor& tensor);
at::Tensor stack(at::TensorList tensors);
at::Tensor cat(at::TensorList tensors);

// Over memory that is not the tensor's; give_back is called at its end.
at::Tensor from_blob(void* data, at::IntArrayRef sizes, const std::function<void(void*)>& give_back,
                     const at::TensorOptions& options);

// out = a b and the like; out may be a view, and is returned.
const at::Tensor& mm_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
const at::Tensor& bmm_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
const at::Tensor& baddbmm_out(const at::Tensor& out, const at::Tensor& c, const at::Tensor& a, const at::Tensor& b);
const at::Tensor& mul_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
const at::Tensor& sub_out(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);
const at::Tensor& sum_out(const at::Tensor& out, const at::Tensor& tensor, int64_t dim, bool keepdim = false);

}  // namespace fastvae::aten
