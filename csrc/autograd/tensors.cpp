// Autograd of the operators of plain tensors.
#include "autograd.h"

namespace fastvae {
namespace {

// --- the two halves of a leapfrog step, the divergence of Gaussians

using FourGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

std::vector<at::Tensor> list_of(FourGradients grads) {
  return {std::get<0>(grads), std::get<1>(grads), std::get<2>(grads), std::get<3>(grads)};
}

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

const Op<decltype(gaussian_kl)>& gaussian_kl_op() {
  static const Op<decltype(gaussian_kl)> op("fastvae::gaussian_kl");
  return op;
}
const Op<decltype(gaussian_kl_backward)>& gaussian_kl_backward_op() {
  static const Op<decltype(gaussian_kl_backward)> op("fastvae::gaussian_kl_backward");
  return op;
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

// --- dot products of per-sample gradients

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
    const std::vector<int64_t> needs = needed_inputs(ctx, saved.size());
    const std::vector<int64_t> bias = ctx->saved_data["bias"].toIntVector();
    variable_list found = grad_dot_backward_op()(grads[0], list(0), list(1), list(2), list(3), bias, needs);
    drop_unneeded(found, needs);
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
  m.impl("grad_dot", &fastvae::grad_dot_autograd);
  m.impl("grad_dot_backward", &fastvae::grad_dot_backward_autograd);
}
