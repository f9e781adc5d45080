// elbo_terms with a gradient that can be differentiated again, for Python to hand in.
#pragma once

#include "../common/operator.h"

namespace fastvae {

// The gradient of an operator by operations that PyTorch can differentiate again: what its caller gave for the case
// that somebody wants create_graph=True. From cotangents (undefined: zero) and the data that were saved to the
// gradients of forward()'s variables.
struct DifferentiableGradient : torch::CustomClassHolder {
  virtual variable_list operator()(const variable_list& cotangents, const at::Tensor& x,
                                   const at::Tensor& noise) const = 0;
};
using OptionalGradient = c10::intrusive_ptr<DifferentiableGradient>;

// The operator elbo_terms with autograd: log_px, kl, mu, logvar, z.
variable_list differentiable_elbo_terms(const at::Tensor& x, const at::Tensor& noise, at::TensorList encoder_parameters,
                                        at::TensorList decoder_parameters, std::string_view encoder,
                                        std::string_view decoder, std::string_view likelihood,
                                        const OptionalGradient& again);

}  // namespace fastvae
