// What the autograd of every operator is made of. A forward op records its closed-form gradient, another op, once; the
// gradient of that one is refused, because a missing formula would silently drop terms.
//
// In C++ because the Python registration costs about 0.5 ms a call for an op that takes a list of tensors, more than
// the flow through a small network itself [measured].
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../ops/ops.h"

namespace fastvae {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Calls an op by its schema, one dispatch key below autograd inside forward(), from the top inside backward().
template <typename Signature>
struct Op;
template <typename Result, typename... Args>
struct Op<Result(Args...)> {
  explicit Op(const char* name)
      : handle(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Args...)>()) {}
  Result operator()(Args... args) const { return handle.call(std::forward<Args>(args)...); }
  c10::TypedOperatorHandle<Result(Args...)> handle;
};

[[noreturn]] inline void refuse_second_derivative(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "fastvae::", op,
                              ": differentiable once; its second derivative is not implemented. "
                              "For create_graph=True use fastvae.reference.",
                              op, ", which PyTorch can differentiate twice");
}

// The gradient of an operator by operations that PyTorch can differentiate again: what its caller gave for the case
// that somebody wants create_graph=True. From cotangents (undefined: zero) and the data that were saved to the
// gradients of forward()'s variables.
struct DifferentiableGradient : torch::CustomClassHolder {
  virtual variable_list operator()(const variable_list& cotangents, const at::Tensor& x,
                                   const at::Tensor& noise) const = 0;
};
using OptionalGradient = c10::intrusive_ptr<DifferentiableGradient>;

// elbo_terms (ops.h) with autograd: log_px, kl, mu, logvar, z.
variable_list differentiable_elbo_terms(const at::Tensor& x, const at::Tensor& noise, at::TensorList encoder_parameters,
                                        at::TensorList decoder_parameters, std::string_view encoder,
                                        std::string_view decoder, std::string_view likelihood,
                                        const OptionalGradient& again);

inline OptionalTensor optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Which of the first inputs of forward() need a gradient, as the operators take it.
inline std::vector<int64_t> needed_inputs(const AutogradContext* ctx, size_t inputs) {
  std::vector<int64_t> needs(inputs);
  for (size_t i = 0; i < inputs; ++i) {
    needs[i] = ctx->needs_input_grad(i) ? 1 : 0;
  }
  return needs;
}

// Operators return empty tensors in the place of gradients that nobody needs; autograd wants undefined ones.
inline void drop_unneeded(variable_list& gradients, const std::vector<int64_t>& needs) {
  for (size_t i = 0; i < needs.size(); ++i) {
    if (needs[i] == 0) {
      gradients[i] = at::Tensor();
    }
  }
}

}  // namespace fastvae
