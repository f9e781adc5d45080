// log_px has no gradient: its result asks for none, or says so when a gradient is wanted of it.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/ops.h"

namespace fastvae {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LogPxFunction : torch::autograd::Function<LogPxFunction> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& z, const at::Tensor& x, at::TensorList parameters,
                            std::string_view network, std::string_view likelihood) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("fastvae::log_px", "").typed<decltype(log_px)>();
    return op.call(z, x, parameters, network, likelihood);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "fastvae::log_px: forward only, it has no gradient; differentiate "
                                "likelihood.log_prob(decoder(z), x) instead");
  }
};

at::Tensor log_px_autograd(const at::Tensor& z, const at::Tensor& x, at::TensorList parameters,
                           std::string_view network, std::string_view likelihood) {
  return LogPxFunction::apply(z, x, parameters, network, likelihood);
}

}  // namespace
}  // namespace fastvae

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) { m.impl("log_px", &fastvae::log_px_autograd); }
