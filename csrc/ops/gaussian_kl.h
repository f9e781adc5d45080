// The divergence, for other operators to call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastvae {

// KL(q || p) [B] between diagonal Gaussians [B, d]; without mu_p and logvar_p, p is standard normal.
at::Tensor gaussian_kl(const at::Tensor& mu_q, const at::Tensor& logvar_q, const std::optional<at::Tensor>& mu_p,
                       const std::optional<at::Tensor>& logvar_p);

}  // namespace fastvae
