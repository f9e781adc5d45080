// The four rules of a normalisation with the activation behind it, on a CPU, for the sweeps in Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "../kernels/norm_activation.h"

namespace fastvae {

class NormActivationRules {
 public:
  using OptionalTensor = std::optional<at::Tensor>;

  // statistics: "none", "given", "groups" or "root_square"; activation: "identity", or as a network's text has it.
  NormActivationRules(const std::string& statistics, int64_t groups, double eps, const std::string& activation);

  // y, mean and s, for x [B, C, ...]; given mean and s are [C]. Gain and bias are [C], or [A, C] where the first B / A
  // rows of x have the first ones, and so on; then there are no latents.
  std::tuple<at::Tensor, OptionalTensor, OptionalTensor> forward(const at::Tensor& x, const OptionalTensor& gain,
                                                                 const OptionalTensor& bias, const OptionalTensor& mean,
                                                                 const OptionalTensor& s) const;
  // dx, dgain, dbias (the latter where affine), for dy [L B, C, ...].
  std::tuple<at::Tensor, OptionalTensor, OptionalTensor> reverse(const at::Tensor& dy, const at::Tensor& x,
                                                                 const OptionalTensor& gain, const OptionalTensor& bias,
                                                                 const OptionalTensor& mean, const OptionalTensor& s,
                                                                 bool affine) const;
  at::Tensor tangent(const at::Tensor& x_dot, const at::Tensor& x, const OptionalTensor& gain,
                     const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& s) const;
  // The gradients of <dy_dot, y> + <dy, ydot>.
  std::tuple<at::Tensor, OptionalTensor, OptionalTensor> adjoint(const OptionalTensor& dy_dot, const OptionalTensor& dy,
                                                                 const at::Tensor& x_dot, const at::Tensor& x,
                                                                 const OptionalTensor& gain, const OptionalTensor& bias,
                                                                 const OptionalTensor& mean, const OptionalTensor& s,
                                                                 bool affine) const;

 private:
  struct Call;

  Statistics statistics_;
  int64_t groups_;
  double eps_;
  ActivationSpec activation_;
};

}  // namespace fastvae
