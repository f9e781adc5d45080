// The flow through a network of any size: one sweep over its layers a force.
//
// FLOPs: with G those of one GEMM pass over the weights at batch B, forward 2 (K + 1) G, backward 4 (K + 1) G, and
// 2 (K + 1) G more where the activations are recomputed instead of stored.

#include "../common/aten.h"
#include "../common/launch.h"
#include "../common/recycling.h"
#include "../network/network.h"
#include "flow.h"

namespace fastvae {
namespace {

// Steps whose weight gradients are formed by one GEMM a layer: enough for the GEMM to run at its rate, few enough to
// keep the workspace independent of K. A GPU waits for its host, and wants few launches.
constexpr int64_t kStackedStepsOnCpu = 4, kStackedStepsOnCuda = 16;

// F = grad_z ll - z, written where forces are kept.
void write_force(at::Tensor force, const at::Tensor& gradient, const at::Tensor& z) {
  aten::sub_out(force, gradient, z);
}

// The stash: the tapes of all steps, then the forces [K + 1, B, d].
at::Tensor stashed_forces(const Flow& flow, const at::Tensor& stash) {
  const int64_t points = flow.steps + 1;
  return stash.narrow(0, points * flow.samples * flow.program->tape_numel(), points * flow.samples * flow.dim)
      .view({points, flow.samples, flow.dim});
}

}  // namespace

void sweep_flow(const Flow& flow, const FlowPath& path) {
  const Network network(flow.op, *flow.program, flow.likelihood, flow.parameters, flow.z);
  const at::Tensor x = network.observed_to_rows(flow.x);
  const at::TensorOptions options = flow.z.options();
  const int64_t K = flow.steps;
  const bool store = path.stash.numel() > 0, trajectory = path.log_px_steps.size(0) > 0;
  const at::Tensor &z_steps = path.z_steps, &rho_steps = path.rho_steps, &stash = path.stash;
  z_steps[0].copy_(flow.z);
  rho_steps[0].copy_(flow.rho);

  const at::Tensor scratch = store ? at::Tensor() : reused({flow.samples * flow.program->tape_numel()}, options);
  const at::Tensor forces = store ? stashed_forces(flow, stash) : aten::empty({2, flow.samples, flow.dim}, options);
  const at::Tensor rho_half = aten::empty({flow.samples, flow.dim}, options);
  const auto force_at = [&](int64_t k) { return forces[store ? k : k % 2]; };
  const auto gradient_at = [&](int64_t k) {
    const Tape tape =
        store ? network.tape(stash, K + 1, flow.samples, k, 1) : network.tape(scratch, 1, flow.samples, 0, 1);
    const at::Tensor ll = k == K ? path.log_px : (trajectory ? path.log_px_steps[k] : at::Tensor());
    return network.forward_reverse(z_steps[k], x, tape, ll);
  };

  write_force(force_at(0), gradient_at(0), z_steps[0]);
  for (int64_t k = 0; k < K; ++k) {
    const at::Tensor step = flow.step_size[k], alpha_k = flow.alpha[k];
    const at::Tensor z_k = z_steps[k], rho_k = rho_steps[k], z_next = z_steps[k + 1], rho_next = rho_steps[k + 1];
    const at::Tensor force = force_at(k), force_next = force_at(k + 1);
    FASTVAE_DISPATCH(flow.z, {
      const KickDrift<scalar_t> drift{z_k.const_data_ptr<scalar_t>(),
                                      rho_k.const_data_ptr<scalar_t>(),
                                      force.const_data_ptr<scalar_t>(),
                                      step.const_data_ptr<scalar_t>(),
                                      1,
                                      z_next.mutable_data_ptr<scalar_t>(),
                                      rho_half.mutable_data_ptr<scalar_t>(),
                                      flow.samples,
                                      flow.dim};
      FASTVAE_LAUNCH(kick_drift, flow.z.device(), drift, drift.samples, drift.dim);
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
      FASTVAE_LAUNCH(kick_temper, flow.z.device(), temper, temper.samples, temper.dim);
    });
  }
  if (trajectory) {
    path.log_px_steps[K].copy_(path.log_px);
  }
}

void sweep_flow_backward(const Flow& flow, const FlowPath& path, const FlowCotangents& cotangents, FlowResult& out) {
  const Network network(flow.op, *flow.program, flow.likelihood, flow.parameters, flow.z);
  const at::Tensor x = network.observed_to_rows(flow.x);
  const at::TensorOptions options = flow.z.options();
  const int64_t K = flow.steps, B = flow.samples, d = flow.dim;
  const bool store = path.stash.numel() > 0;
  const at::Tensor &z_steps = path.z_steps, &rho_steps = path.rho_steps, &stash = path.stash;
  const at::Tensor grad_x = out.wants_x ? aten::zeros({x.numel()}, options) : at::Tensor();
  const bool any_parameter = out.wants_parameters();

  const int64_t stacked = runs_cuda(flow.z) ? kStackedStepsOnCuda : kStackedStepsOnCpu;
  const int64_t slots = out.factors != nullptr ? K + 1 : std::min(K + 1, stacked);
  const at::Tensor workspace = store ? at::Tensor() : reused({slots * B * flow.program->tape_numel()}, options);
  const at::Tensor forces = store ? stashed_forces(flow, stash) : aten::empty({2, B, d}, options);
  const TangentTape tangents = network.make_tangent_tape(slots * B);
  const at::Tensor us = aten::empty({slots, B, d}, options);
  const auto slot_of = [&](int64_t k) { return k % slots; };
  const auto force_at = [&](int64_t k) { return forces[store ? k : k % 2]; };
  const auto tape_at = [&](int64_t k, int64_t count) {
    return store ? network.tape(stash, K + 1, B, k, count) : network.tape(workspace, slots, B, slot_of(k), count);
  };
  const auto sweep_again = [&](int64_t k) {
    if (!store) {
      write_force(force_at(k), network.forward_reverse(z_steps[k], x, tape_at(k, 1), at::Tensor()), z_steps[k]);
    }
  };
  // H(u) at step k, with u in its slot. The parameters' part follows once the slots hold steps k, k + 1, ...
  const auto hessian = [&](int64_t k) {
    const at::Tensor dz = network.tangent_adjoint(us[slot_of(k)], x, k == K ? cotangents.log_px : at::Tensor(),
                                                  tape_at(k, 1), tangents.rows(slot_of(k), 1, slots), grad_x);
    if (slot_of(k) == 0 && any_parameter) {
      const int64_t count = std::min(slots, K + 1 - k);
      network.accumulate_parameters(z_steps.narrow(0, k, count), us.narrow(0, 0, count), tape_at(k, count),
                                    tangents.rows(0, count, slots), out.parameters);
    }
    return dz;
  };

  const auto start_from = [](const at::Tensor& gradient, const at::Tensor& cotangent) {
    cotangent.defined() ? gradient.copy_(cotangent) : gradient.zero_();
  };
  start_from(out.z, cotangents.z);
  start_from(out.rho, cotangents.rho);
  sweep_again(K);
  if (out.wants_x && cotangents.log_px.defined()) {
    network.add_observed_gradient(z_steps[K], tape_at(K, 1), cotangents.log_px, grad_x);
  }
  const at::Tensor grad_momentum = aten::empty({B, d}, options);
  // The terms of one step, or, handed out or summed in one go, of all.
  const int64_t kept = out.factors != nullptr || runs_cuda(flow.z) ? K : 1;
  const at::Tensor all_step_terms = out.step_size.defined() ? aten::empty({kept, B, d}, options) : at::Tensor();
  const at::Tensor all_alpha_terms = out.alpha.defined() ? aten::empty({kept, B, d}, options) : at::Tensor();
  for (int64_t k = K - 1; k >= 0; --k) {
    const at::Tensor step_terms = all_step_terms.defined() ? all_step_terms[k % kept] : at::Tensor();
    const at::Tensor alpha_terms = all_alpha_terms.defined() ? all_alpha_terms[k % kept] : at::Tensor();
    const at::Tensor step = flow.step_size[k], alpha_k = flow.alpha[k], rho_k = rho_steps[k];
    const at::Tensor u = us[slot_of(k + 1)], force_next = force_at(k + 1), force = force_at(k);
    FASTVAE_DISPATCH(flow.z, {
      KickTemperBackward<scalar_t> temper{};
      temper.grad = out.rho.const_data_ptr<scalar_t>();
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
      FASTVAE_LAUNCH(kick_temper_backward, flow.z.device(), temper, temper.samples, temper.dim);

      const at::Tensor dz = hessian(k + 1);
      sweep_again(k);

      KickDriftBackward<scalar_t> drift{};
      drift.grad_z = out.z.const_data_ptr<scalar_t>();
      drift.grad_rho_half = grad_momentum.const_data_ptr<scalar_t>();
      drift.hessian = dz.const_data_ptr<scalar_t>();
      drift.through_force = u.const_data_ptr<scalar_t>();
      drift.rho = rho_k.const_data_ptr<scalar_t>();
      drift.force = force.const_data_ptr<scalar_t>();
      drift.grad_rho_next = out.rho.const_data_ptr<scalar_t>();
      drift.force_next = force_next.const_data_ptr<scalar_t>();
      drift.step = step.const_data_ptr<scalar_t>();
      drift.step_stride = 1;
      drift.grad_z_out = out.z.mutable_data_ptr<scalar_t>();
      drift.grad_rho = out.rho.mutable_data_ptr<scalar_t>();
      // The cotangent of F(z_k) waits where u of step k will be.
      drift.grad_force = us[slot_of(k)].mutable_data_ptr<scalar_t>();
      drift.step_terms = mutable_data_or_null<scalar_t>(step_terms);
      drift.alpha_terms = mutable_data_or_null<scalar_t>(alpha_terms);
      drift.accumulate_step = true;
      drift.samples = B;
      drift.dim = d;
      FASTVAE_LAUNCH(kick_drift_backward, flow.z.device(), drift, drift.samples, drift.dim);
    });
    if (k % kept == 0) {
      if (step_terms.defined()) {
        aten::sum_out(out.step_size.narrow(0, k, kept), all_step_terms, /*dim=*/1, /*keepdim=*/false);
      }
      if (alpha_terms.defined()) {
        aten::sum_out(out.alpha.narrow(0, k, kept), all_alpha_terms.view({kept, B * d}), 1, false);
      }
    }
  }
  out.z.add_(hessian(0)).sub_(us[0]);
  if (out.factors != nullptr) {
    out.factors->step_terms = all_step_terms;
    out.factors->alpha_terms = all_alpha_terms;
    out.factors->stages = network.factors(z_steps, us, tape_at(0, K + 1), tangents, K + 1);
  }
  if (out.wants_x) {
    out.x = network.observed_from_rows(grad_x);
  }
}

}  // namespace fastvae
