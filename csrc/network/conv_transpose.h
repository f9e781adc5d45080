// Transposed convolutions on a CPU by our own kernels, where ATen's run 2 to 25 times above their floor [measured]:
// direct products over windows (kernels/cpu/direct_convolution.cpp), to one to three channels with a forward of their
// own; with dilation, or a weight that no cache holds, GEMM + fold / unfold (kernels/cpu/convolution.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include "program.h"

namespace fastvae {

enum class ConvTransposeRoute { kLibrary, kDirect, kNarrow, kFolded };

ConvTransposeRoute conv_transpose_route(const Stage& stage, const at::Tensor& weight);

// Whether the library is given planes, images and weight: the weight outweighs the images of a batch, and oneDNN brings
// planes sooner into its blocks than channel-last weights [Zen 4: 1024 to 512 channels, 5x5, 8x8: gradients 0.8 of the
// time].
bool is_in_planes(const Stage& stage, const at::Tensor& weight);

// The weight as the functions below take it: the library's, dense; [C_in, kh, kw, C_out] folded; else [2, kh, kw, C_in
// C_out], as the forward and as the backward kernels read it.
at::Tensor conv_transpose_pack(const Stage& stage, const at::Tensor& weight);

// By any route but the library's.
void conv_transpose(const Stage& stage, const at::Tensor& packed, const at::Tensor& in, const at::Tensor& out);
void conv_transpose_reverse(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                            const at::Tensor& out);
// gradient [C_in, C_out, kh, kw] += h (x) delta
void conv_transpose_add_weight_gradient(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                                        const at::Tensor& h, at::Tensor& gradient);

// log_prob [B] of x under the outputs + bias (or undefined), which are not stored. By the direct route alone.
void conv_transpose_log_prob(const Stage& stage, const at::Tensor& packed, const at::Tensor& bias, const at::Tensor& in,
                             const at::Tensor& x, const LikelihoodSpec& likelihood, const at::Tensor& log_prob);

}  // namespace fastvae
