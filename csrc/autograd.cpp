// Autograd of every operator: a forward op records its closed-form gradient, another op, once; the gradient of that
// one is refused, because a missing formula would silently drop terms.
//
// In C++ because the Python registration costs about 0.5 ms a call for an op that takes a list of tensors, more than
// the flow through a small network itself [measured].
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/ops.h"

namespace fastvae {
namespace {

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

[[noreturn]] void refuse_second_derivative(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "fastvae::", op,
                              ": differentiable once; its second derivative is not implemented. "
                              "For create_graph=True use fastvae.reference.",
                              op, ", which PyTorch can differentiate twice");
}

using FourGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

std::vector<at::Tensor> list_of(FourGradients grads) {
  return {std::get<0>(grads), std::get<1>(grads), std::get<2>(grads), std::get<3>(grads)};
}

// ---- the two halves of a leapfrog step ----

using Kick = std::tuple<at::Tensor, at::Tensor>;

const Op<decltype(leapfrog_kick_drift)>& kick_drift_op() {
  static const Op<decltype(leapfrog_kick_drift)> op("fastvae::leapfrog_kick_drift");
  return op;
}
const Op<decltype(leapfrog_kick_drift_backward)>& kick_drift_backward_op() {
  static const Op<decltype(leapfrog_kick_drift_backward)> op("fastvae::leapfrog_kick_drift_backward");
  return op;
}
const Op<decltype(leapfrog_kick_temper)>& kick_temper_op() {
  static const Op<decltype(leapfrog_kick_temper)> op("fastvae::leapfrog_kick_temper");
  return op;
}
const Op<decltype(leapfrog_kick_temper_backward)>& kick_temper_backward_op() {
  static const Op<decltype(leapfrog_kick_temper_backward)> op("fastvae::leapfrog_kick_temper_backward");
  return op;
}

struct KickDriftFunction : Function<KickDriftFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& z, const at::Tensor& rho,
                               const at::Tensor& force, const at::Tensor& step_size) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({z, rho, force, step_size});
    auto [z_next, rho_half] = kick_drift_op()(z, rho, force, step_size);
    return {z_next, rho_half};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    return list_of(kick_drift_backward_op()(grads[0], grads[1], saved[0], saved[1], saved[2], saved[3]));
  }
};

struct KickDriftBackwardFunction : Function<KickDriftBackwardFunction> {
  static variable_list forward(AutogradContext*, const at::Tensor& grad_z_next, const at::Tensor& grad_rho_half,
                               const at::Tensor& z, const at::Tensor& rho, const at::Tensor& force,
                               const at::Tensor& step_size) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return list_of(kick_drift_backward_op()(grad_z_next, grad_rho_half, z, rho, force, step_size));
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    refuse_second_derivative("leapfrog_kick_drift");
  }
};

struct KickTemperFunction : Function<KickTemperFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& rho_half, const at::Tensor& force,
                            const at::Tensor& step_size, const at::Tensor& alpha) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({rho_half, force, step_size, alpha});
    return kick_temper_op()(rho_half, force, step_size, alpha);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    return list_of(kick_temper_backward_op()(grads[0], saved[0], saved[1], saved[2], saved[3]));
  }
};

struct KickTemperBackwardFunction : Function<KickTemperBackwardFunction> {
  static variable_list forward(AutogradContext*, const at::Tensor& grad_rho_next, const at::Tensor& rho_half,
                               const at::Tensor& force, const at::Tensor& step_size, const at::Tensor& alpha) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return list_of(kick_temper_backward_op()(grad_rho_next, rho_half, force, step_size, alpha));
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    refuse_second_derivative("leapfrog_kick_temper");
  }
};

Kick kick_drift(const at::Tensor& z, const at::Tensor& rho, const at::Tensor& force, const at::Tensor& step_size) {
  const variable_list out = KickDriftFunction::apply(z, rho, force, step_size);
  return {out[0], out[1]};
}

FourGradients kick_drift_backward(const at::Tensor& grad_z_next, const at::Tensor& grad_rho_half, const at::Tensor& z,
                                  const at::Tensor& rho, const at::Tensor& force, const at::Tensor& step_size) {
  const variable_list out = KickDriftBackwardFunction::apply(grad_z_next, grad_rho_half, z, rho, force, step_size);
  return {out[0], out[1], out[2], out[3]};
}

at::Tensor kick_temper(const at::Tensor& rho_half, const at::Tensor& force, const at::Tensor& step_size,
                       const at::Tensor& alpha) {
  return KickTemperFunction::apply(rho_half, force, step_size, alpha);
}

FourGradients kick_temper_backward(const at::Tensor& grad_rho_next, const at::Tensor& rho_half, const at::Tensor& force,
                                   const at::Tensor& step_size, const at::Tensor& alpha) {
  const variable_list out = KickTemperBackwardFunction::apply(grad_rho_next, rho_half, force, step_size, alpha);
  return {out[0], out[1], out[2], out[3]};
}

// ---- the Kullback-Leibler divergence of Gaussians ----

const Op<decltype(gaussian_kl)>& gaussian_kl_op() {
  static const Op<decltype(gaussian_kl)> op("fastvae::gaussian_kl");
  return op;
}
const Op<decltype(gaussian_kl_backward)>& gaussian_kl_backward_op() {
  static const Op<decltype(gaussian_kl_backward)> op("fastvae::gaussian_kl_backward");
  return op;
}

OptionalTensor optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

struct GaussianKlFunction : Function<GaussianKlFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& mu_q, const at::Tensor& logvar_q,
                            const OptionalTensor& mu_p, const OptionalTensor& logvar_p) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor kl = gaussian_kl_op()(mu_q, logvar_q, mu_p, logvar_p);
    ctx->save_for_backward({mu_q, logvar_q, mu_p.value_or(at::Tensor()), logvar_p.value_or(at::Tensor())});
    return kl;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list found =
        list_of(gaussian_kl_backward_op()(grads[0], saved[0], saved[1], optional_of(saved[2]), optional_of(saved[3])));
    if (!saved[2].defined()) {
      found[2] = found[3] = at::Tensor();
    }
    return found;
  }
};

struct GaussianKlBackwardFunction : Function<GaussianKlBackwardFunction> {
  static variable_list forward(AutogradContext*, const at::Tensor& grad, const at::Tensor& mu_q,
                               const at::Tensor& logvar_q, const OptionalTensor& mu_p, const OptionalTensor& logvar_p) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return list_of(gaussian_kl_backward_op()(grad, mu_q, logvar_q, mu_p, logvar_p));
  }
  static variable_list backward(AutogradContext*, const variable_list&) { refuse_second_derivative("gaussian_kl"); }
};

at::Tensor gaussian_kl_autograd(const at::Tensor& mu_q, const at::Tensor& logvar_q, const OptionalTensor& mu_p,
                                const OptionalTensor& logvar_p) {
  return GaussianKlFunction::apply(mu_q, logvar_q, mu_p, logvar_p);
}

FourGradients gaussian_kl_backward_autograd(const at::Tensor& grad, const at::Tensor& mu_q, const at::Tensor& logvar_q,
                                            const OptionalTensor& mu_p, const OptionalTensor& logvar_p) {
  const variable_list out = GaussianKlBackwardFunction::apply(grad, mu_q, logvar_q, mu_p, logvar_p);
  return {out[0], out[1], out[2], out[3]};
}

// ---- the Hamiltonian flow ----

const Op<decltype(hamiltonian_flow)>& flow_op() {
  static const Op<decltype(hamiltonian_flow)> op("fastvae::hamiltonian_flow");
  return op;
}
const Op<decltype(hamiltonian_flow_backward)>& flow_backward_op() {
  static const Op<decltype(hamiltonian_flow_backward)> op("fastvae::hamiltonian_flow_backward");
  return op;
}

// The tensors of a flow that have a gradient: z, rho, x, step_size, alpha, then the parameters.
constexpr size_t kFlowInputs = 5;

struct FlowFunction : Function<FlowFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& z, const at::Tensor& rho, const at::Tensor& x,
                               const at::Tensor& step_size, const at::Tensor& alpha, at::TensorList parameters,
                               std::string_view network, std::string_view likelihood, bool store, bool trajectory) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [z_K, rho_K, log_px, z_steps, rho_steps, log_px_steps, stash] =
        flow_op()(z, rho, x, step_size, alpha, parameters, network, likelihood, store, trajectory);
    variable_list saved{z, rho, x, step_size, alpha, z_steps, rho_steps, stash};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["network"] = std::string(network);
    ctx->saved_data["likelihood"] = std::string(likelihood);
    ctx->saved_data["store"] = store;
    ctx->mark_non_differentiable({z_steps, rho_steps, log_px_steps, stash});
    ctx->set_materialize_grads(false);
    return {z_K, rho_K, log_px, z_steps, rho_steps, log_px_steps, stash};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList parameters = at::TensorList(saved).slice(kFlowInputs + 3);
    std::vector<int64_t> needs(kFlowInputs + parameters.size());
    for (size_t i = 0; i < needs.size(); ++i) {
      needs[i] = ctx->needs_input_grad(i) ? 1 : 0;
    }
    const std::string& network = ctx->saved_data["network"].toStringRef();
    const std::string& likelihood = ctx->saved_data["likelihood"].toStringRef();
    // Nothing to record, and so no need of the op's own autograd, unless this gradient is to be differentiated.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) {
      below.emplace();
    }
    auto [grad_z, grad_rho, grad_x, grad_step, grad_alpha, grad_parameters] =
        flow_backward_op()(optional_of(grads[0]), optional_of(grads[1]), optional_of(grads[2]), saved[0], saved[1],
                           saved[2], saved[3], saved[4], parameters, saved[5], saved[6], saved[7], network, likelihood,
                           ctx->saved_data["store"].toBool(), needs);
    variable_list found{grad_z, grad_rho, grad_x, grad_step, grad_alpha};
    found.insert(found.end(), grad_parameters.begin(), grad_parameters.end());
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i] == 0) {
        found[i] = at::Tensor();
      }
    }
    found.resize(found.size() + 4);  // network, likelihood, store, trajectory
    return found;
  }
};

struct FlowBackwardFunction : Function<FlowBackwardFunction> {
  static variable_list forward(AutogradContext*, const OptionalTensor& grad_z, const OptionalTensor& grad_rho,
                               const OptionalTensor& grad_log_px, const at::Tensor& z, const at::Tensor& rho,
                               const at::Tensor& x, const at::Tensor& step_size, const at::Tensor& alpha,
                               at::TensorList parameters, const at::Tensor& z_steps, const at::Tensor& rho_steps,
                               const at::Tensor& stash, std::string_view network, std::string_view likelihood,
                               bool store, at::IntArrayRef needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [grad_z_in, grad_rho_in, grad_x, grad_step, grad_alpha, grad_parameters] =
        flow_backward_op()(grad_z, grad_rho, grad_log_px, z, rho, x, step_size, alpha, parameters, z_steps, rho_steps,
                           stash, network, likelihood, store, needs);
    variable_list out{grad_z_in, grad_rho_in, grad_x, grad_step, grad_alpha};
    out.insert(out.end(), grad_parameters.begin(), grad_parameters.end());
    return out;
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    refuse_second_derivative("hamiltonian_flow");
  }
};

FlowOutputs flow(const at::Tensor& z, const at::Tensor& rho, const at::Tensor& x, const at::Tensor& step_size,
                 const at::Tensor& alpha, at::TensorList parameters, std::string_view network,
                 std::string_view likelihood, bool store, bool trajectory) {
  const variable_list out =
      FlowFunction::apply(z, rho, x, step_size, alpha, parameters, network, likelihood, store, trajectory);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

FlowGradients flow_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_rho,
                            const OptionalTensor& grad_log_px, const at::Tensor& z, const at::Tensor& rho,
                            const at::Tensor& x, const at::Tensor& step_size, const at::Tensor& alpha,
                            at::TensorList parameters, const at::Tensor& z_steps, const at::Tensor& rho_steps,
                            const at::Tensor& stash, std::string_view network, std::string_view likelihood, bool store,
                            at::IntArrayRef needs) {
  const variable_list out =
      FlowBackwardFunction::apply(grad_z, grad_rho, grad_log_px, z, rho, x, step_size, alpha, parameters, z_steps,
                                  rho_steps, stash, network, likelihood, store, needs);
  return {out[0], out[1], out[2], out[3], out[4], std::vector<at::Tensor>(out.begin() + kFlowInputs, out.end())};
}

// ---- the Jacobian penalty ----

const Op<decltype(jacobian_l1)>& jacobian_op() {
  static const Op<decltype(jacobian_l1)> op("fastvae::jacobian_l1");
  return op;
}
const Op<decltype(jacobian_l1_with_gradient)>& jacobian_with_gradient_op() {
  static const Op<decltype(jacobian_l1_with_gradient)> op("fastvae::jacobian_l1_with_gradient");
  return op;
}

// grad * gradient for the gradients of a scalar; takes what they were computed from, to refuse to go through them.
struct JacobianScaleFunction : Function<JacobianScaleFunction> {
  static variable_list forward(AutogradContext*, const at::Tensor& grad, at::TensorList gradients,
                               at::TensorList inputs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list scaled;
    for (const at::Tensor& gradient : gradients) {
      scaled.push_back(gradient.mul(grad));
    }
    return scaled;
  }
  static variable_list backward(AutogradContext*, const variable_list&) { refuse_second_derivative("jacobian_l1"); }
};

// Inputs: z and the parameters. A scalar's gradient is computed with its value and kept; that of "none" waits for the
// cotangents of the samples.
struct JacobianFunction : Function<JacobianFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& z, at::TensorList parameters,
                            std::string_view network, at::IntArrayRef latents, int64_t p, std::string_view reduction,
                            const std::vector<int64_t>& needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved{z};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    at::Tensor value;
    if (reduction == "none") {
      value = jacobian_op()(z, parameters, network, latents, p, reduction);
    } else {
      auto [reduced, grad_z, grad_parameters] =
          jacobian_with_gradient_op()(std::nullopt, z, parameters, network, latents, p, reduction, needs);
      value = reduced;
      variable_list gradients{grad_z};
      gradients.insert(gradients.end(), grad_parameters.begin(), grad_parameters.end());
      ctx->saved_data["gradients"] = gradients;
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["needs"] = needs;
    ctx->saved_data["network"] = std::string(network);
    ctx->saved_data["latents"] = latents.vec();
    ctx->saved_data["p"] = p;
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> needs = ctx->saved_data["needs"].toIntVector();
    const size_t inputs = needs.size();
    variable_list found;
    if (const auto kept = ctx->saved_data.find("gradients"); kept != ctx->saved_data.end()) {
      variable_list gradients = kept->second.toTensorVector();
      // Without retain_graph nobody asks again: the gradients become the result, instead of a copy of all parameters.
      if (!torch::autograd::get_current_graph_task_keep_graph() && !at::GradMode::is_enabled() &&
          !at::isTensorSubclassLike(grads[0]) && !at::areAnyTensorSubclassLike(gradients)) {
        ctx->saved_data.erase(kept);
        for (const at::Tensor& gradient : gradients) {
          found.push_back(gradient.mul_(grads[0]));
        }
      } else {
        found = JacobianScaleFunction::apply(grads[0], at::TensorList(gradients), at::TensorList(saved));
      }
    } else {
      const std::vector<int64_t> latents = ctx->saved_data["latents"].toIntVector();
      auto [value, grad_z, grad_parameters] = jacobian_with_gradient_op()(
          grads[0], saved[0], at::TensorList(saved).slice(1), ctx->saved_data["network"].toStringRef(), latents,
          ctx->saved_data["p"].toInt(), "none", needs);
      found.push_back(grad_z);
      found.insert(found.end(), grad_parameters.begin(), grad_parameters.end());
    }
    for (size_t i = 0; i < inputs; ++i) {
      if (needs[i] == 0) {
        found[i] = at::Tensor();
      }
    }
    found.resize(inputs + 5);  // network, latents, p, reduction, needs
    return found;
  }
};

struct JacobianGradientFunction : Function<JacobianGradientFunction> {
  static variable_list forward(AutogradContext*, const OptionalTensor& cotangent, const at::Tensor& z,
                               at::TensorList parameters, std::string_view network, at::IntArrayRef latents, int64_t p,
                               std::string_view reduction, at::IntArrayRef needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [value, grad_z, grad_parameters] =
        jacobian_with_gradient_op()(cotangent, z, parameters, network, latents, p, reduction, needs);
    variable_list out{value, grad_z};
    out.insert(out.end(), grad_parameters.begin(), grad_parameters.end());
    return out;
  }
  static variable_list backward(AutogradContext*, const variable_list&) { refuse_second_derivative("jacobian_l1"); }
};

at::Tensor jacobian(const at::Tensor& z, at::TensorList parameters, std::string_view network, at::IntArrayRef latents,
                    int64_t p, std::string_view reduction) {
  std::vector<int64_t> needs{z.requires_grad()};
  for (const at::Tensor& parameter : parameters) {
    needs.push_back(parameter.requires_grad());
  }
  if (!at::GradMode::is_enabled() || std::none_of(needs.begin(), needs.end(), [](int64_t need) { return need != 0; })) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return jacobian_op()(z, parameters, network, latents, p, reduction);
  }
  return JacobianFunction::apply(z, parameters, network, latents, p, reduction, needs);
}

JacobianGradients jacobian_with_gradient(const OptionalTensor& cotangent, const at::Tensor& z,
                                         at::TensorList parameters, std::string_view network, at::IntArrayRef latents,
                                         int64_t p, std::string_view reduction, at::IntArrayRef needs) {
  const variable_list out =
      JacobianGradientFunction::apply(cotangent, z, parameters, network, latents, p, reduction, needs);
  return {out[0], out[1], std::vector<at::Tensor>(out.begin() + 2, out.end())};
}

// ---- dot products of per-sample gradients ----

const Op<decltype(grad_dot)>& grad_dot_op() {
  static const Op<decltype(grad_dot)> op("fastvae::grad_dot");
  return op;
}
const Op<decltype(grad_dot_backward)>& grad_dot_backward_op() {
  static const Op<decltype(grad_dot_backward)> op("fastvae::grad_dot_backward");
  return op;
}

// The lists of factors: inputs and output gradients of a, then of b.
constexpr size_t kFactorLists = 4;

struct GradDotFunction : Function<GradDotFunction> {
  static at::Tensor forward(AutogradContext* ctx, at::TensorList inputs_a, at::TensorList output_grads_a,
                            at::TensorList inputs_b, at::TensorList output_grads_b, at::IntArrayRef bias) {
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved;
    for (const at::TensorList list : {inputs_a, output_grads_a, inputs_b, output_grads_b}) {
      saved.insert(saved.end(), list.begin(), list.end());
    }
    at::Tensor out = grad_dot_op()(inputs_a, output_grads_a, inputs_b, output_grads_b, bias);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["bias"] = bias.vec();
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t depth = saved.size() / kFactorLists;
    const auto list = [&](size_t index) { return at::TensorList(saved).slice(index * depth, depth); };
    std::vector<int64_t> needs(saved.size());
    for (size_t i = 0; i < needs.size(); ++i) {
      needs[i] = ctx->needs_input_grad(i) ? 1 : 0;
    }
    const std::vector<int64_t> bias = ctx->saved_data["bias"].toIntVector();
    variable_list found = grad_dot_backward_op()(grads[0], list(0), list(1), list(2), list(3), bias, needs);
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i] == 0) {
        found[i] = at::Tensor();
      }
    }
    found.emplace_back();  // bias
    return found;
  }
};

struct GradDotBackwardFunction : Function<GradDotBackwardFunction> {
  static variable_list forward(AutogradContext*, const at::Tensor& grad, at::TensorList inputs_a,
                               at::TensorList output_grads_a, at::TensorList inputs_b, at::TensorList output_grads_b,
                               at::IntArrayRef bias, at::IntArrayRef needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return grad_dot_backward_op()(grad, inputs_a, output_grads_a, inputs_b, output_grads_b, bias, needs);
  }
  static variable_list backward(AutogradContext*, const variable_list&) { refuse_second_derivative("grad_dot"); }
};

at::Tensor grad_dot_autograd(at::TensorList inputs_a, at::TensorList output_grads_a, at::TensorList inputs_b,
                             at::TensorList output_grads_b, at::IntArrayRef bias) {
  return GradDotFunction::apply(inputs_a, output_grads_a, inputs_b, output_grads_b, bias);
}

std::vector<at::Tensor> grad_dot_backward_autograd(const at::Tensor& grad, at::TensorList inputs_a,
                                                   at::TensorList output_grads_a, at::TensorList inputs_b,
                                                   at::TensorList output_grads_b, at::IntArrayRef bias,
                                                   at::IntArrayRef needs) {
  return GradDotBackwardFunction::apply(grad, inputs_a, output_grads_a, inputs_b, output_grads_b, bias, needs);
}

}  // namespace
}  // namespace fastvae

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("leapfrog_kick_drift", &fastvae::kick_drift);
  m.impl("leapfrog_kick_drift_backward", &fastvae::kick_drift_backward);
  m.impl("leapfrog_kick_temper", &fastvae::kick_temper);
  m.impl("leapfrog_kick_temper_backward", &fastvae::kick_temper_backward);
  m.impl("gaussian_kl", &fastvae::gaussian_kl_autograd);
  m.impl("gaussian_kl_backward", &fastvae::gaussian_kl_backward_autograd);
  m.impl("hamiltonian_flow", &fastvae::flow);
  m.impl("hamiltonian_flow_backward", &fastvae::flow_backward);
  m.impl("grad_dot", &fastvae::grad_dot_autograd);
  m.impl("grad_dot_backward", &fastvae::grad_dot_backward_autograd);
  m.impl("jacobian_l1", &fastvae::jacobian);
  m.impl("jacobian_l1_with_gradient", &fastvae::jacobian_with_gradient);
}
