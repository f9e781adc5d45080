// The two halves of a leapfrog step for any potential: check, allocate, launch. Their formulas:
// kernels/math/leapfrog.h.
#include <algorithm>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/operator.h"

namespace fastvae {
namespace {

void check_state(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& first,
                 const char* first_name) {
  check_like(op, name, tensor, first, first_name);
  check_sizes(op, name, tensor, first.sizes());
}

void check_first(const char* op, const char* name, const at::Tensor& first) {
  check_floating(op, name, first);
  FASTVAE_CHECK_VALUE(first.dim() == 2, op, name, "shape [B, d]", describe(first));
}

// step_size: one number or [d].
void check_step(const char* op, const at::Tensor& step_size, const at::Tensor& first, const char* first_name) {
  check_like(op, "step_size", step_size, first, first_name);
  FASTVAE_CHECK_VALUE(step_size.numel() == 1 || (step_size.dim() == 1 && step_size.size(0) == first.size(1)), op,
                      "step_size", c10::str("one number or shape [", first.size(1), "]"), describe(step_size));
}

at::Tensor sum_to_step(const at::Tensor& terms, const at::Tensor& step_size) {
  return step_size.numel() == 1 ? terms.sum().view(step_size.sizes()) : terms.sum(0);
}

// How many samples share a row of terms: a row is at most what a core does at a time, and sums few enough numbers.
int64_t samples_of_row(const at::Tensor& first) {
  constexpr int64_t kMost = 64;
  return runs_cuda(first) ? 1 : std::clamp<int64_t>(kGrain / std::max<int64_t>(1, first.size(1)), 1, kMost);
}

// Room for the terms of one kind, [rows, d].
at::Tensor rows_of_terms(const at::Tensor& first, int64_t share) {
  return aten::empty({(first.size(0) + share - 1) / share, first.size(1)}, first.options());
}

int64_t stride_of(const at::Tensor& step_size) { return step_size.numel() == 1 ? 0 : 1; }

std::tuple<at::Tensor, at::Tensor> leapfrog_kick_drift(const at::Tensor& z, const at::Tensor& rho,
                                                       const at::Tensor& force, const at::Tensor& step_size) {
  constexpr const char* op = "leapfrog_kick_drift";
  const EntryGuard guard(op, z);
  check_first(op, "z", z);
  check_state(op, "rho", rho, z, "z");
  check_state(op, "force", force, z, "z");
  check_step(op, step_size, z, "z");
  const at::Tensor z_ = z.contiguous(), rho_ = rho.contiguous(), force_ = force.contiguous();
  const at::Tensor step_ = step_size.contiguous();
  at::Tensor z_next = aten::empty(z.sizes(), z.options());
  at::Tensor rho_half = aten::empty(z.sizes(), z.options());
  FASTVAE_DISPATCH(z, {
    const KickDrift<scalar_t> args{z_.const_data_ptr<scalar_t>(),
                                   rho_.const_data_ptr<scalar_t>(),
                                   force_.const_data_ptr<scalar_t>(),
                                   step_.const_data_ptr<scalar_t>(),
                                   stride_of(step_),
                                   z_next.mutable_data_ptr<scalar_t>(),
                                   rho_half.mutable_data_ptr<scalar_t>(),
                                   z.size(0),
                                   z.size(1)};
    FASTVAE_LAUNCH(kick_drift, z.device(), args, args.samples, args.dim);
  });
  return {z_next, rho_half};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> leapfrog_kick_drift_backward(
    const at::Tensor& grad_z_next, const at::Tensor& grad_rho_half, const at::Tensor& z, const at::Tensor& rho,
    const at::Tensor& force, const at::Tensor& step_size) {
  constexpr const char* op = "leapfrog_kick_drift_backward";
  const EntryGuard guard(op, z);
  check_first(op, "z", z);
  check_state(op, "grad_z_next", grad_z_next, z, "z");
  check_state(op, "grad_rho_half", grad_rho_half, z, "z");
  check_state(op, "rho", rho, z, "z");
  check_state(op, "force", force, z, "z");
  check_step(op, step_size, z, "z");
  const at::Tensor grad_z_ = grad_z_next.contiguous(), grad_rho_ = grad_rho_half.contiguous();
  const at::Tensor rho_ = rho.contiguous(), force_ = force.contiguous(), step_ = step_size.contiguous();
  at::Tensor grad_z = aten::empty(z.sizes(), z.options());
  at::Tensor grad_rho = aten::empty(z.sizes(), z.options());
  at::Tensor grad_force = aten::empty(z.sizes(), z.options());
  const int64_t share = samples_of_row(z);
  at::Tensor step_terms = rows_of_terms(z, share);
  FASTVAE_DISPATCH(z, {
    KickDriftBackward<scalar_t> args{};
    args.grad_z = grad_z_.const_data_ptr<scalar_t>();
    args.grad_rho_half = grad_rho_.const_data_ptr<scalar_t>();
    args.rho = rho_.const_data_ptr<scalar_t>();
    args.force = force_.const_data_ptr<scalar_t>();
    args.step = step_.const_data_ptr<scalar_t>();
    args.step_stride = stride_of(step_);
    args.grad_z_out = grad_z.mutable_data_ptr<scalar_t>();
    args.grad_rho = grad_rho.mutable_data_ptr<scalar_t>();
    args.grad_force = grad_force.mutable_data_ptr<scalar_t>();
    args.step_terms = step_terms.mutable_data_ptr<scalar_t>();
    args.samples = z.size(0);
    args.dim = z.size(1);
    args.share = share;
    FASTVAE_LAUNCH(kick_drift_backward, z.device(), args, step_terms.size(0), share * args.dim);
  });
  return {grad_z, grad_rho, grad_force, sum_to_step(step_terms, step_size)};
}

at::Tensor leapfrog_kick_temper(const at::Tensor& rho_half, const at::Tensor& force, const at::Tensor& step_size,
                                const at::Tensor& alpha) {
  constexpr const char* op = "leapfrog_kick_temper";
  const EntryGuard guard(op, rho_half);
  check_first(op, "rho_half", rho_half);
  check_state(op, "force", force, rho_half, "rho_half");
  check_step(op, step_size, rho_half, "rho_half");
  check_like(op, "alpha", alpha, rho_half, "rho_half");
  FASTVAE_CHECK_VALUE(alpha.numel() == 1, op, "alpha", "one number", describe(alpha));
  const at::Tensor rho_ = rho_half.contiguous(), force_ = force.contiguous();
  const at::Tensor step_ = step_size.contiguous(), alpha_ = alpha.contiguous();
  at::Tensor rho_next = aten::empty(rho_half.sizes(), rho_half.options());
  FASTVAE_DISPATCH(rho_half, {
    KickTemper<scalar_t> args{};
    args.rho_half = rho_.const_data_ptr<scalar_t>();
    args.force = force_.const_data_ptr<scalar_t>();
    args.step = step_.const_data_ptr<scalar_t>();
    args.step_stride = stride_of(step_);
    args.alpha = alpha_.const_data_ptr<scalar_t>();
    args.rho_next = rho_next.mutable_data_ptr<scalar_t>();
    args.samples = rho_half.size(0);
    args.dim = rho_half.size(1);
    FASTVAE_LAUNCH(kick_temper, rho_half.device(), args, args.samples, args.dim);
  });
  return rho_next;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> leapfrog_kick_temper_backward(
    const at::Tensor& grad_rho_next, const at::Tensor& rho_half, const at::Tensor& force, const at::Tensor& step_size,
    const at::Tensor& alpha) {
  constexpr const char* op = "leapfrog_kick_temper_backward";
  const EntryGuard guard(op, rho_half);
  check_first(op, "rho_half", rho_half);
  check_state(op, "grad_rho_next", grad_rho_next, rho_half, "rho_half");
  check_state(op, "force", force, rho_half, "rho_half");
  check_step(op, step_size, rho_half, "rho_half");
  check_like(op, "alpha", alpha, rho_half, "rho_half");
  FASTVAE_CHECK_VALUE(alpha.numel() == 1, op, "alpha", "one number", describe(alpha));
  const at::Tensor grad_ = grad_rho_next.contiguous(), rho_ = rho_half.contiguous(), force_ = force.contiguous();
  const at::Tensor step_ = step_size.contiguous(), alpha_ = alpha.contiguous();
  at::Tensor grad_rho = aten::empty(rho_half.sizes(), rho_half.options());
  at::Tensor grad_force = aten::empty(rho_half.sizes(), rho_half.options());
  const int64_t share = samples_of_row(rho_half);
  at::Tensor step_terms = rows_of_terms(rho_half, share), alpha_terms = rows_of_terms(rho_half, share);
  FASTVAE_DISPATCH(rho_half, {
    KickTemperBackward<scalar_t> args{};
    args.grad = grad_.const_data_ptr<scalar_t>();
    args.rho_half = rho_.const_data_ptr<scalar_t>();
    args.force = force_.const_data_ptr<scalar_t>();
    args.step = step_.const_data_ptr<scalar_t>();
    args.step_stride = stride_of(step_);
    args.alpha = alpha_.const_data_ptr<scalar_t>();
    args.grad_momentum = grad_rho.mutable_data_ptr<scalar_t>();
    args.grad_force = grad_force.mutable_data_ptr<scalar_t>();
    args.alpha_terms = alpha_terms.mutable_data_ptr<scalar_t>();
    args.step_terms = step_terms.mutable_data_ptr<scalar_t>();
    args.samples = rho_half.size(0);
    args.dim = rho_half.size(1);
    args.share = share;
    FASTVAE_LAUNCH(kick_temper_backward, rho_half.device(), args, step_terms.size(0), share * args.dim);
  });
  return {grad_rho, grad_force, sum_to_step(step_terms, step_size), alpha_terms.sum().view(alpha.sizes())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_operator<&leapfrog_kick_drift>(
      m, "leapfrog_kick_drift(Tensor z, Tensor rho, Tensor force, Tensor step_size) -> (Tensor, Tensor)",
      differentiable<&leapfrog_kick_drift, Calls<&leapfrog_kick_drift_backward>>());
  define_operator<&leapfrog_kick_drift_backward>(
      m,
      "leapfrog_kick_drift_backward(Tensor grad_z_next, Tensor grad_rho_half, Tensor z, Tensor rho, Tensor force, "
      "Tensor step_size) -> (Tensor, Tensor, Tensor, Tensor)",
      differentiated_once("leapfrog_kick_drift"));
  define_operator<&leapfrog_kick_temper>(
      m, "leapfrog_kick_temper(Tensor rho_half, Tensor force, Tensor step_size, Tensor alpha) -> Tensor",
      differentiable<&leapfrog_kick_temper, Calls<&leapfrog_kick_temper_backward>>());
  define_operator<&leapfrog_kick_temper_backward>(
      m,
      "leapfrog_kick_temper_backward(Tensor grad_rho_next, Tensor rho_half, Tensor force, Tensor step_size, "
      "Tensor alpha) -> (Tensor, Tensor, Tensor, Tensor)",
      differentiated_once("leapfrog_kick_temper"));
}

}  // namespace fastvae
