// Transposed convolutions on a CPU by our own kernels, where ATen's run 2 to 25 times above their floor [measured]:
// GEMM + fold / unfold for many channels, one kernel for one to three (kernels/cpu/convolution.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include "program.h"

namespace fastvae {

enum class ConvTransposeRoute { kLibrary, kFolded, kNarrow };

ConvTransposeRoute conv_transpose_route(const Stage& stage, const at::Tensor& weight);

// The weight as the folded route reads it: [C_in, kh, kw, C_out].
at::Tensor conv_transpose_pack(const at::Tensor& weight);

void narrow_conv_transpose(const Stage& stage, const at::Tensor& weight, const at::Tensor& in, const at::Tensor& out);
void folded_conv_transpose(const Stage& stage, const at::Tensor& packed, const at::Tensor& in, const at::Tensor& out);
void folded_conv_transpose_reverse(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                                   const at::Tensor& out);
// gradient [C_in, C_out, kh, kw] += h^T unfold(delta)
void folded_conv_transpose_add_weight_gradient(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                                               const at::Tensor& h, at::Tensor& gradient);

}  // namespace fastvae
