// Leapfrog updates and their gradients on a GPU (kernels.h and math/leapfrog.h give the formulas; cpu/leapfrog.cpp is
// the twin). One thread a coordinate, memory bound.
#include "../math/leapfrog.h"

#include "launch.cuh"

namespace fastvae::cuda {

template <typename Args>
__device__ Walk walk_coordinates(const Args& args) {
  return {global_thread(), global_threads(), args.samples * args.dim, args.dim};
}

template <typename T>
__global__ void kick_drift_kernel(const KickDrift<T> args) {
  for (Walk at = walk_coordinates(args); at.inside(); at.next()) {
    const int64_t i = at.i;
    const T step = args.step[at.column * args.step_stride];
    const math::Drifted<T> next = math::kick_drift(args.z[i], args.rho[i], args.force[i], step);
    args.z_next[i] = next.z;
    args.rho_half[i] = next.rho_half;
  }
}

template <typename T>
__global__ void kick_temper_kernel(const KickTemper<T> args) {
  const T alpha = *args.alpha;
  for (Walk at = walk_coordinates(args); at.inside(); at.next()) {
    const int64_t i = at.i;
    const T step = args.step[at.column * args.step_stride];
    const T force = args.z == nullptr ? args.force[i] : args.force[i] - args.z[i];
    args.rho_next[i] = math::kick_temper(args.rho_half[i], force, step, alpha);
    if (args.force_out != nullptr) {
      args.force_out[i] = force;
    }
  }
}

template <typename T>
__global__ void kick_temper_backward_kernel(const KickTemperBackward<T> args) {
  const T alpha = *args.alpha;
  for (Walk at = walk_coordinates(args); at.inside(); at.next()) {
    const int64_t i = at.i;
    const T step = args.step[at.column * args.step_stride];
    const T rho_half = args.rho_half == nullptr ? T(0) : args.rho_half[i];
    const math::TemperCotangent<T> grad =
        math::kick_temper_backward(args.grad[i], rho_half, args.force[i], step, alpha);
    args.grad_momentum[i] = grad.momentum;
    args.grad_force[i] = args.pending == nullptr ? grad.force : grad.force + args.pending[i];
    if (args.alpha_terms != nullptr) {
      args.alpha_terms[i] = grad.alpha;
    }
    if (args.step_terms != nullptr) {
      args.step_terms[i] = grad.step;
    }
  }
}

template <typename T>
__global__ void kick_drift_backward_kernel(const KickDriftBackward<T> args) {
  for (Walk at = walk_coordinates(args); at.inside(); at.next()) {
    const int64_t i = at.i;
    const T step = args.step[at.column * args.step_stride];
    const T rho = args.rho[i];
    const T force = args.force[i];
    T grad_z = args.grad_z[i];
    if (args.hessian != nullptr) {
      grad_z += args.hessian[i] - args.through_force[i];
    }
    const math::DriftCotangent<T> grad = math::kick_drift_backward(grad_z, args.grad_rho_half[i], rho, force, step);
    if (args.alpha_terms != nullptr) {
      const T rho_half = math::kick_drift(T(0), rho, force, step).rho_half;
      args.alpha_terms[i] = args.grad_rho_next[i] * (rho_half + T(0.5) * step * args.force_next[i]);
    }
    args.grad_z_out[i] = grad_z;
    args.grad_rho[i] = grad.rho;
    args.grad_force[i] = grad.force;
    if (args.step_terms != nullptr) {
      args.step_terms[i] = args.accumulate_step ? args.step_terms[i] + grad.step : grad.step;
    }
  }
}

#define FASTVAE_DEFINE_BY_COORDINATE(NAME, ARGS)                                              \
  template <typename T>                                                                       \
  void NAME##_launch(const ARGS<T>& args, Stream stream) {                                    \
    launch(#NAME, NAME##_kernel<T>, grid_for_elements(args.samples* args.dim), stream, args); \
  }                                                                                           \
  FASTVAE_DEFINE_CUDA(NAME, ARGS)

FASTVAE_DEFINE_BY_COORDINATE(kick_drift, KickDrift)
FASTVAE_DEFINE_BY_COORDINATE(kick_temper, KickTemper)
FASTVAE_DEFINE_BY_COORDINATE(kick_temper_backward, KickTemperBackward)
FASTVAE_DEFINE_BY_COORDINATE(kick_drift_backward, KickDriftBackward)

}  // namespace fastvae::cuda
