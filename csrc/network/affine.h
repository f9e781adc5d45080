// The affine maps A_l of a network by ATen (GEMM and convolution come from the libraries behind it), on tensors stored
// channel last. None adds the bias: the pointwise kernel after it does, in the same pass as the activation.
//
// Each gives the tensor that holds the result: `out` where the library can write into it, else a new one.
#pragma once

#include <ATen/core/Tensor.h>

#include "program.h"

namespace fastvae {

// The weight as the other functions take it: dense, and packed where a kernel of ours reads it.
at::Tensor affine_pack(const Stage& stage, const at::Tensor& weight);

at::Tensor affine_apply(const Stage& stage, const at::Tensor& weight, const at::Tensor& in, const at::Tensor& out);
at::Tensor affine_transpose(const Stage& stage, const at::Tensor& weight, const at::Tensor& delta,
                            const at::Tensor& out);

// Whether both products are as fast by a few samples at a time.
bool affine_in_blocks(const Stage& stage, const at::Tensor& weight);

// gradient += delta (x) h summed over rows, in the layout of the weight tensor.
void affine_add_weight_gradient(const Stage& stage, const at::Tensor& weight, const at::Tensor& delta,
                                const at::Tensor& h, at::Tensor& gradient);
// The same as a new tensor of these sizes: without zeros that would be written and read again.
at::Tensor affine_weight_gradient(const Stage& stage, const at::Tensor& weight, const at::Tensor& delta,
                                  const at::Tensor& h, at::IntArrayRef sizes);

}  // namespace fastvae
