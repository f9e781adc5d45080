// Convolutions of which every sample owns the weights, for the copies in Python: on a CPU, in one to three dimensions.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../kernels/copied_convolution.h"

namespace fastvae {

// The numbers of a plain convolution from larger images to smaller ones; a transposed one is its way back.
class CopiedConvolutionRules {
 public:
  CopiedConvolutionRules(const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups);

  // Images are [B images, channels, ...] with the channels last in memory, weights [B, taps, channels / groups,
  // filters], biases [B, filters or channels].
  at::Tensor smaller(const at::Tensor& larger, const at::Tensor& weight, const std::optional<at::Tensor>& bias) const;
  // sizes: of the larger image.
  at::Tensor larger(const at::Tensor& smaller, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const std::vector<int64_t>& sizes) const;
  at::Tensor weight(const at::Tensor& larger, const at::Tensor& smaller, int64_t samples) const;

 private:
  CopiedWindow window(at::IntArrayRef larger, at::IntArrayRef smaller) const;
  void check_weight(const at::Tensor& weight, const at::Tensor& images, int64_t channels, int64_t filters) const;

  size_t dims_;
  CopiedWindow numbers_{};
};

}  // namespace fastvae
