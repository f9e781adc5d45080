// Autograd of the operators that sweep a network.
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>

#include "autograd.h"

namespace fastvae {
namespace {

// --- the Hamiltonian flow; log_px, which has no gradient and says so where one is wanted of it

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
    const std::vector<int64_t> needs = needed_inputs(ctx, kFlowInputs + parameters.size());
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
    drop_unneeded(found, needs);
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

struct LogPxFunction : Function<LogPxFunction> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& z, const at::Tensor& x, at::TensorList parameters,
                            std::string_view network, std::string_view likelihood) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const Op<decltype(log_px)> op("fastvae::log_px");
    return op(z, x, parameters, network, likelihood);
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

// --- the Jacobian penalty

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
    drop_unneeded(found, needs);
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

}  // namespace
}  // namespace fastvae

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("hamiltonian_flow", &fastvae::flow);
  m.impl("hamiltonian_flow_backward", &fastvae::flow_backward);
  m.impl("log_px", &fastvae::log_px_autograd);
  m.impl("jacobian_l1", &fastvae::jacobian);
  m.impl("jacobian_l1_with_gradient", &fastvae::jacobian_with_gradient);
}
