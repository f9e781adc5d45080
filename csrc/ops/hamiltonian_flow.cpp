// A leapfrog trajectory through log p(x, z) = ll(f(z); x) - |z|^2 / 2, and its gradient in closed form.
//
// Forward: K + 1 forward and reverse sweeps. Backward: K + 1 tangent and adjoint sweeps, walking the steps from the
// last to the first; ll(z_K) enters as a cotangent of the last force, so the final decode costs nothing.
// FLOPs: with G those of one GEMM pass over the weights at batch B, forward 2 (K + 1) G, backward 4 (K + 1) G, and
// 2 (K + 1) G more where the activations are recomputed instead of stored.
#include <ATen/ops/empty.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>

#include "../common/guard.h"
#include "../common/launch.h"
#include "../network/network.h"
#include "ops.h"
#include "small_flow.h"

namespace fastvae {
namespace {

// Steps whose weight gradients are formed by one GEMM a layer: enough for the GEMM to run at its rate, few enough to
// keep the workspace independent of K.
constexpr int64_t kStackedSteps = 4;

StashShape stash_shape(const Program& program, const LikelihoodSpec& likelihood, int64_t dim, int64_t element_size,
                       at::Device device) {
  return takes_small_flow(program, likelihood, dim, element_size, device) ? small_flow_stash(program, dim, element_size)
                                                                          : StashShape{program.tape_numel() + dim, 1};
}

// The checked inputs, dense, and the network bound to them.
struct Flow {
  Flow(const char* op, const at::Tensor& z_in, const at::Tensor& rho_in, const at::Tensor& x_in,
       const at::Tensor& step_in, const at::Tensor& alpha_in, at::TensorList parameters_in,
       std::string_view network_text, std::string_view likelihood_text)
      : likelihood(parse_likelihood(op, likelihood_text)),
        program(op, network_text, shapes_of(parameters_in), checked_dim(op, z_in), likelihood),
        network(op, program, likelihood, parameters_in, z_in),
        parameters(parameters_in) {
    samples = z_in.size(0);
    dim = z_in.size(1);
    check_like(op, "rho", rho_in, z_in, "z");
    check_sizes(op, "rho", rho_in, z_in.sizes());
    check_like(op, "alpha", alpha_in, z_in, "z");
    FASTVAE_CHECK_VALUE(alpha_in.dim() == 1 && alpha_in.size(0) > 0, op, "alpha", "shape [K] with K > 0",
                        describe(alpha_in));
    steps = alpha_in.size(0);
    check_like(op, "step_size", step_in, z_in, "z");
    check_sizes(op, "step_size", step_in, {steps, dim});
    check_like(op, "x", x_in, z_in, "z");
    check_sizes(op, "x", x_in, {samples, observed_numel(op, program, likelihood)});
    z = z_in.contiguous();
    rho = rho_in.contiguous();
    step_size = step_in.contiguous();
    alpha = alpha_in.contiguous();
    x = network.observed_to_rows(x_in);
  }

  bool small() const { return takes_small_flow(program, likelihood, dim, z.element_size(), z.device()); }
  int64_t stash_numel() const {
    return stash_shape(program, likelihood, dim, z.element_size(), z.device()).total(samples, steps);
  }
  SmallFlowTensors tensors() const {
    SmallFlowTensors dense{z, rho, x, step_size, alpha, {}};
    for (const at::Tensor& parameter : parameters) {
      dense.parameters.push_back(parameter.contiguous());
    }
    return dense;
  }
  // The stash: the tapes of all steps, then the forces [K + 1, B, d].
  at::Tensor forces(const at::Tensor& stash) const {
    return stash.narrow(0, (steps + 1) * samples * program.tape_numel(), (steps + 1) * samples * dim)
        .view({steps + 1, samples, dim});
  }

  LikelihoodSpec likelihood;
  Program program;
  Network network;
  at::TensorList parameters;
  int64_t samples = 0, dim = 0, steps = 0;
  at::Tensor z, rho, x, step_size, alpha;
};

// F = grad_z ll - z, written where forces are kept.
void write_force(at::Tensor force, const at::Tensor& gradient, const at::Tensor& z) { at::sub_out(force, gradient, z); }

}  // namespace

std::tuple<int64_t, int64_t> hamiltonian_flow_stash(std::string_view network, std::string_view likelihood,
                                                    const std::vector<std::vector<int64_t>>& shapes, int64_t latent_dim,
                                                    int64_t element_size, int64_t cuda_index) {
  constexpr const char* op = "hamiltonian_flow";
  const LikelihoodSpec head = parse_likelihood(op, likelihood);
  const at::Device device =
      cuda_index < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda_index));
  const StashShape shape =
      stash_shape(Program(op, network, shapes, latent_dim, head), head, latent_dim, element_size, device);
  return {shape.numel, shape.multiple};
}

FlowOutputs hamiltonian_flow(const at::Tensor& z, const at::Tensor& rho, const at::Tensor& x,
                             const at::Tensor& step_size, const at::Tensor& alpha, at::TensorList parameters,
                             std::string_view network, std::string_view likelihood, bool store, bool trajectory) {
  constexpr const char* op = "hamiltonian_flow";
  const EntryGuard guard(op, {z, rho, x, step_size, alpha});
  const Flow flow(op, z, rho, x, step_size, alpha, parameters, network, likelihood);
  const int64_t K = flow.steps;
  const at::TensorOptions options = z.options();

  const at::Tensor z_steps = at::empty({K + 1, flow.samples, flow.dim}, options);
  const at::Tensor rho_steps = at::empty({K + 1, flow.samples, flow.dim}, options);
  const at::Tensor log_px_steps = at::empty({trajectory ? K + 1 : 0, flow.samples}, options);
  const at::Tensor log_px = at::empty({flow.samples}, options);
  const at::Tensor stash = at::empty({store ? flow.stash_numel() : 0}, options);
  if (store && flow.small() && flow.samples > 0) {
    run_small_flow(flow.program, flow.likelihood, flow.tensors(), z_steps, rho_steps, log_px, log_px_steps, stash);
    return {z_steps[K].clone(), rho_steps[K].clone(), log_px, z_steps, rho_steps, log_px_steps, stash};
  }
  z_steps[0].copy_(flow.z);
  rho_steps[0].copy_(flow.rho);
  if (flow.samples == 0) {
    return {z_steps[K].clone(), rho_steps[K].clone(), log_px, z_steps, rho_steps, log_px_steps, stash};
  }

  const at::Tensor scratch = store ? at::Tensor() : at::empty({flow.samples * flow.program.tape_numel()}, options);
  const at::Tensor forces = store ? flow.forces(stash) : at::empty({2, flow.samples, flow.dim}, options);
  const at::Tensor rho_half = at::empty({flow.samples, flow.dim}, options);
  const auto force_at = [&](int64_t k) { return forces[store ? k : k % 2]; };
  const auto gradient_at = [&](int64_t k) {
    const Tape tape =
        store ? flow.network.tape(stash, K + 1, flow.samples, k, 1) : flow.network.tape(scratch, 1, flow.samples, 0, 1);
    const at::Tensor ll = k == K ? log_px : (trajectory ? log_px_steps[k] : at::Tensor());
    return flow.network.forward_reverse(z_steps[k], flow.x, tape, ll);
  };

  write_force(force_at(0), gradient_at(0), z_steps[0]);
  for (int64_t k = 0; k < K; ++k) {
    const at::Tensor step = flow.step_size[k], alpha_k = flow.alpha[k];
    const at::Tensor z_k = z_steps[k], rho_k = rho_steps[k], z_next = z_steps[k + 1], rho_next = rho_steps[k + 1];
    const at::Tensor force = force_at(k), force_next = force_at(k + 1);
    FASTVAE_DISPATCH(z, {
      const KickDrift<scalar_t> drift{z_k.const_data_ptr<scalar_t>(),
                                      rho_k.const_data_ptr<scalar_t>(),
                                      force.const_data_ptr<scalar_t>(),
                                      step.const_data_ptr<scalar_t>(),
                                      1,
                                      z_next.mutable_data_ptr<scalar_t>(),
                                      rho_half.mutable_data_ptr<scalar_t>(),
                                      flow.samples,
                                      flow.dim};
      FASTVAE_LAUNCH(kick_drift, z.device(), drift, drift.samples, drift.dim);
      const at::Tensor gradient = gradient_at(k + 1);
      const KickTemper<scalar_t> temper{rho_half.const_data_ptr<scalar_t>(),
                                        gradient.const_data_ptr<scalar_t>(),
                                        z_next.const_data_ptr<scalar_t>(),
                                        step.const_data_ptr<scalar_t>(),
                                        1,
                                        alpha_k.const_data_ptr<scalar_t>(),
                                        rho_next.mutable_data_ptr<scalar_t>(),
                                        force_next.mutable_data_ptr<scalar_t>(),
                                        flow.samples,
                                        flow.dim};
      FASTVAE_LAUNCH(kick_temper, z.device(), temper, temper.samples, temper.dim);
    });
  }
  if (trajectory) {
    log_px_steps[K].copy_(log_px);
  }
  return {z_steps[K].clone(), rho_steps[K].clone(), log_px, z_steps, rho_steps, log_px_steps, stash};
}

FlowGradients hamiltonian_flow_backward(const OptionalTensor& grad_z_in, const OptionalTensor& grad_rho_in,
                                        const OptionalTensor& grad_log_px_in, const at::Tensor& z,
                                        const at::Tensor& rho, const at::Tensor& x, const at::Tensor& step_size,
                                        const at::Tensor& alpha, at::TensorList parameters, const at::Tensor& z_steps,
                                        const at::Tensor& rho_steps, const at::Tensor& stash, std::string_view network,
                                        std::string_view likelihood, bool store, at::IntArrayRef needs) {
  constexpr const char* op = "hamiltonian_flow_backward";
  const EntryGuard guard(op, {z, rho, x, step_size, alpha, z_steps, rho_steps, stash});
  const Flow flow(op, z, rho, x, step_size, alpha, parameters, network, likelihood);
  const int64_t K = flow.steps, B = flow.samples, d = flow.dim;
  const at::TensorOptions options = z.options();
  FASTVAE_CHECK_VALUE(needs.size() == 5 + parameters.size(), op, "needs", c10::str(5 + parameters.size(), " flags"),
                      needs.size());
  check_sizes(op, "z_steps", z_steps, {K + 1, B, d});
  check_sizes(op, "rho_steps", rho_steps, {K + 1, B, d});
  check_sizes(op, "stash", stash, {store ? flow.stash_numel() : 0});
  FASTVAE_CHECK_VALUE(flow.likelihood.kind != Likelihood::kCategorical || !needs[2], op, "x",
                      "no gradient (a class has none)", "x.requires_grad");

  const auto cotangent_of = [&](const OptionalTensor& grad, const char* name, at::IntArrayRef sizes) {
    if (!grad.has_value()) {
      return at::Tensor();
    }
    check_like(op, name, *grad, z, "z");
    check_sizes(op, name, *grad, sizes);
    return grad->contiguous();
  };
  const at::Tensor grad_log_px = cotangent_of(grad_log_px_in, "grad_log_px", {B});
  const at::Tensor grad_z_K = cotangent_of(grad_z_in, "grad_z", {B, d});
  const at::Tensor grad_rho_K = cotangent_of(grad_rho_in, "grad_rho", {B, d});
  std::vector<at::Tensor> gradients(parameters.size());
  bool any_parameter = false;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (needs[5 + i]) {
      gradients[i] = at::zeros(parameters[i].sizes(), options);
      any_parameter = true;
    }
  }
  const at::Tensor grad_x = needs[2] ? at::zeros({flow.x.numel()}, options) : at::Tensor();
  at::Tensor grad_z, grad_rho;
  const at::Tensor grad_step = needs[3] ? at::empty({K, d}, options) : at::Tensor();
  const at::Tensor grad_alpha = needs[4] ? at::empty({K}, options) : at::Tensor();
  const auto finish = [&] {
    // Each its own tensor, also where nothing is wanted: outputs of an op must not alias.
    const auto wanted = [&](bool need, const at::Tensor& gradient) {
      return need ? gradient : at::empty({0}, options);
    };
    for (at::Tensor& gradient : gradients) {
      gradient = wanted(gradient.defined(), gradient);
    }
    return FlowGradients{wanted(needs[0], grad_z),
                         wanted(needs[1], grad_rho),
                         needs[2] ? flow.network.observed_from_rows(grad_x) : at::empty({0}, options),
                         wanted(needs[3], grad_step),
                         wanted(needs[4], grad_alpha),
                         gradients};
  };
  if (B == 0) {
    grad_z = at::empty({B, d}, options);
    grad_rho = at::empty({B, d}, options);
    for (const at::Tensor& gradient : {grad_step, grad_alpha}) {
      if (gradient.defined()) {
        gradient.zero_();
      }
    }
    return finish();
  }

  if (store && flow.small()) {
    grad_z = at::empty({B, d}, options);
    grad_rho = at::empty({B, d}, options);
    const at::Tensor step_terms = needs[3] ? at::empty({K, B, d}, options) : at::Tensor();
    const at::Tensor alpha_terms = needs[4] ? at::empty({K, B}, options) : at::Tensor();
    run_small_flow_backward(flow.program, flow.likelihood, flow.tensors(), stash, grad_z_K, grad_rho_K, grad_log_px,
                            grad_z, grad_rho, grad_x, step_terms, alpha_terms, gradients);
    if (needs[3]) {
      grad_step.copy_(step_terms.sum(1));
    }
    if (needs[4]) {
      grad_alpha.copy_(alpha_terms.sum(1));
    }
    return finish();
  }

  const int64_t slots = std::min(K + 1, kStackedSteps);
  const at::Tensor workspace = store ? at::Tensor() : at::empty({slots * B * flow.program.tape_numel()}, options);
  const at::Tensor forces = store ? flow.forces(stash) : at::empty({2, B, d}, options);
  const TangentTape tangents = flow.network.make_tangent_tape(slots * B);
  const at::Tensor us = at::empty({slots, B, d}, options);
  const auto slot_of = [&](int64_t k) { return k % slots; };
  const auto force_at = [&](int64_t k) { return forces[store ? k : k % 2]; };
  const auto tape_at = [&](int64_t k, int64_t count) {
    return store ? flow.network.tape(stash, K + 1, B, k, count)
                 : flow.network.tape(workspace, slots, B, slot_of(k), count);
  };
  const auto sweep_again = [&](int64_t k) {
    if (!store) {
      write_force(force_at(k), flow.network.forward_reverse(z_steps[k], flow.x, tape_at(k, 1), at::Tensor()),
                  z_steps[k]);
    }
  };
  // H(u) at step k, with u in its slot. The parameters' part follows once the slots hold steps k, k + 1, ...
  const auto hessian = [&](int64_t k) {
    const at::Tensor dz = flow.network.tangent_adjoint(us[slot_of(k)], flow.x, k == K ? grad_log_px : at::Tensor(),
                                                       tape_at(k, 1), tangents.rows(slot_of(k), 1, slots), grad_x);
    if (slot_of(k) == 0 && any_parameter) {
      const int64_t count = std::min(slots, K + 1 - k);
      flow.network.accumulate_parameters(z_steps.narrow(0, k, count), us.narrow(0, 0, count), tape_at(k, count),
                                         tangents.rows(0, count, slots), gradients);
    }
    return dz;
  };

  grad_z = grad_z_K.defined() ? grad_z_K.clone() : at::zeros({B, d}, options);
  grad_rho = grad_rho_K.defined() ? grad_rho_K.clone() : at::zeros({B, d}, options);
  sweep_again(K);
  if (needs[2] && grad_log_px.defined()) {
    flow.network.add_observed_gradient(z_steps[K], tape_at(K, 1), grad_log_px, grad_x);
  }
  const at::Tensor grad_momentum = at::empty({B, d}, options);
  const at::Tensor step_terms = needs[3] ? at::empty({B, d}, options) : at::Tensor();
  const at::Tensor alpha_terms = needs[4] ? at::empty({B, d}, options) : at::Tensor();
  for (int64_t k = K - 1; k >= 0; --k) {
    const at::Tensor step = flow.step_size[k], alpha_k = flow.alpha[k], rho_k = rho_steps[k];
    const at::Tensor u = us[slot_of(k + 1)], force_next = force_at(k + 1), force = force_at(k);
    FASTVAE_DISPATCH(z, {
      KickTemperBackward<scalar_t> temper{};
      temper.grad = grad_rho.const_data_ptr<scalar_t>();
      temper.force = force_next.const_data_ptr<scalar_t>();
      temper.step = step.const_data_ptr<scalar_t>();
      temper.step_stride = 1;
      temper.alpha = alpha_k.const_data_ptr<scalar_t>();
      temper.pending = k == K - 1 ? nullptr : u.const_data_ptr<scalar_t>();
      temper.grad_momentum = grad_momentum.mutable_data_ptr<scalar_t>();
      temper.grad_force = u.mutable_data_ptr<scalar_t>();
      temper.step_terms = mutable_data_or_null<scalar_t>(step_terms);
      temper.samples = B;
      temper.dim = d;
      FASTVAE_LAUNCH(kick_temper_backward, z.device(), temper, temper.samples, temper.dim);

      const at::Tensor dz = hessian(k + 1);
      sweep_again(k);

      KickDriftBackward<scalar_t> drift{};
      drift.grad_z = grad_z.const_data_ptr<scalar_t>();
      drift.grad_rho_half = grad_momentum.const_data_ptr<scalar_t>();
      drift.hessian = dz.const_data_ptr<scalar_t>();
      drift.through_force = u.const_data_ptr<scalar_t>();
      drift.rho = rho_k.const_data_ptr<scalar_t>();
      drift.force = force.const_data_ptr<scalar_t>();
      drift.grad_rho_next = grad_rho.const_data_ptr<scalar_t>();
      drift.force_next = force_next.const_data_ptr<scalar_t>();
      drift.step = step.const_data_ptr<scalar_t>();
      drift.step_stride = 1;
      drift.grad_z_out = grad_z.mutable_data_ptr<scalar_t>();
      drift.grad_rho = grad_rho.mutable_data_ptr<scalar_t>();
      // The cotangent of F(z_k) waits where u of step k will be.
      drift.grad_force = us[slot_of(k)].mutable_data_ptr<scalar_t>();
      drift.step_terms = mutable_data_or_null<scalar_t>(step_terms);
      drift.alpha_terms = mutable_data_or_null<scalar_t>(alpha_terms);
      drift.accumulate_step = true;
      drift.samples = B;
      drift.dim = d;
      FASTVAE_LAUNCH(kick_drift_backward, z.device(), drift, drift.samples, drift.dim);
    });
    if (step_terms.defined()) {
      grad_step[k].copy_(step_terms.sum(0));
    }
    if (alpha_terms.defined()) {
      grad_alpha[k].copy_(alpha_terms.sum());
    }
  }
  grad_z.add_(hessian(0)).sub_(us[0]);
  return finish();
}

}  // namespace fastvae
