// Adam on the parameters of all samples' copies of a network, whose gradients come from elsewhere (on a CPU).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "copies.h"

namespace fastvae {

class CopiesAdam {
 public:
  // values: contiguous, [B, ...] each; changed in place.
  CopiesAdam(const std::vector<at::Tensor>& values, const AdamSettings& settings);

  // One step. gradients: of each value, in its shape; or delta [B, out] of a matrix [B, out, in] whose gradient is
  // delta (x) input, with `inputs` [B, in]. What has none is left alone, decay and all.
  void step(const std::vector<std::optional<at::Tensor>>& gradients,
            const std::vector<std::optional<at::Tensor>>& inputs);

 private:
  std::vector<at::Tensor> values_, means_, squares_;
  AdamSettings settings_;
  int64_t steps_ = 0;
};

}  // namespace fastvae
