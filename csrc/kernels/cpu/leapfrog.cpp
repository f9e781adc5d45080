// Leapfrog updates and their gradients over [samples, dim] (kernels.h and math/leapfrog.h give the formulas).
//
// Cost: a handful of FLOPs an element; memory bound, 3 to 8 arrays read and 2 to 4 written.
#include "../math/leapfrog.h"

#include <type_traits>

#include "../kernels.h"
#include "clones.h"

namespace fastvae::cpu {

// Calls body(j, step) for every coordinate of a sample; a step for all is read once.
template <typename Args, typename Body>
FASTVAE_INLINE void for_each_of_sample(const Args& args, const Body& body) {
  if (args.step_stride == 0) {
    const auto step = *args.step;
#pragma GCC ivdep
    for (int64_t j = 0; j < args.dim; ++j) {
      body(j, step);
    }
  } else {
#pragma GCC ivdep
    for (int64_t j = 0; j < args.dim; ++j) {
      body(j, args.step[j]);
    }
  }
}

// Calls body(i, step) for every element of samples [begin, end).
template <typename Args, typename Body>
FASTVAE_INLINE void for_each_coordinate(const Args& args, int64_t begin, int64_t end, const Body& body) {
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t first = sample * args.dim;
    for_each_of_sample(args, [&](int64_t j, auto step) FASTVAE_LAMBDA_INLINE { body(first + j, step); });
  }
}

// Calls body(i, t, step, adds) for every element i of the rows of terms [begin, end) and its term t, to which the first
// sample of a row does not add.
template <typename Args, typename Body>
FASTVAE_INLINE void for_each_term(const Args& args, int64_t begin, int64_t end, const Body& body) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * args.share,
                  last = first + args.share < args.samples ? first + args.share : args.samples;
    const int64_t term = row * args.dim;
    for_each_of_sample(args, [&](int64_t j, auto step) FASTVAE_LAMBDA_INLINE {
      body(first * args.dim + j, term + j, step, std::false_type{});
    });
    for (int64_t sample = first + 1; sample < last; ++sample) {
      for_each_of_sample(args, [&](int64_t j, auto step) FASTVAE_LAMBDA_INLINE {
        body(sample * args.dim + j, term + j, step, std::true_type{});
      });
    }
  }
}

template <typename T>
FASTVAE_INLINE void put(T* terms, int64_t t, T value, bool adds) {
  if (terms != nullptr) {
    terms[t] = adds ? terms[t] + value : value;
  }
}

template <typename T>
FASTVAE_INLINE void kick_drift_template(const KickDrift<T>& args, int64_t begin, int64_t end) {
  for_each_coordinate(args, begin, end, [&](int64_t i, T step) FASTVAE_LAMBDA_INLINE {
    const math::Drifted<T> next = math::kick_drift(args.z[i], args.rho[i], args.force[i], step);
    args.z_next[i] = next.z;
    args.rho_half[i] = next.rho_half;
  });
}

template <typename T>
FASTVAE_INLINE void kick_temper_template(const KickTemper<T>& args, int64_t begin, int64_t end) {
  const T alpha = *args.alpha;
  for_each_coordinate(args, begin, end, [&](int64_t i, T step) FASTVAE_LAMBDA_INLINE {
    const T force = args.z == nullptr ? args.force[i] : args.force[i] - args.z[i];
    args.rho_next[i] = math::kick_temper(args.rho_half[i], force, step, alpha);
    if (args.force_out != nullptr) {
      args.force_out[i] = force;
    }
  });
}

template <typename T>
FASTVAE_INLINE void kick_temper_backward_template(const KickTemperBackward<T>& args, int64_t begin, int64_t end) {
  const T alpha = *args.alpha;
  for_each_term(args, begin, end, [&](int64_t i, int64_t t, T step, auto adds) FASTVAE_LAMBDA_INLINE {
    const T rho_half = args.rho_half == nullptr ? T(0) : args.rho_half[i];
    const math::TemperCotangent<T> grad =
        math::kick_temper_backward(args.grad[i], rho_half, args.force[i], step, alpha);
    args.grad_momentum[i] = grad.momentum;
    args.grad_force[i] = args.pending == nullptr ? grad.force : grad.force + args.pending[i];
    put(args.alpha_terms, t, grad.alpha, adds);
    put(args.step_terms, t, grad.step, adds);
  });
}

template <typename T>
FASTVAE_INLINE void kick_drift_backward_template(const KickDriftBackward<T>& args, int64_t begin, int64_t end) {
  for_each_term(args, begin, end, [&](int64_t i, int64_t t, T step, auto adds) FASTVAE_LAMBDA_INLINE {
    T grad_z = args.grad_z[i];
    if (args.hessian != nullptr) {
      grad_z += args.hessian[i] - args.through_force[i];
    }
    const math::DriftCotangent<T> grad =
        math::kick_drift_backward(grad_z, args.grad_rho_half[i], args.rho[i], args.force[i], step);
    if (args.alpha_terms != nullptr) {
      const T rho_half = math::kick_drift(T(0), args.rho[i], args.force[i], step).rho_half;
      put(args.alpha_terms, t, args.grad_rho_next[i] * (rho_half + T(0.5) * step * args.force_next[i]), adds);
    }
    args.grad_z_out[i] = grad_z;
    args.grad_rho[i] = grad.rho;
    args.grad_force[i] = grad.force;
    put(args.step_terms, t, grad.step, adds || args.accumulate_step);
  });
}

FASTVAE_DEFINE_CPU(kick_drift, KickDrift)
FASTVAE_DEFINE_CPU(kick_temper, KickTemper)
FASTVAE_DEFINE_CPU(kick_temper_backward, KickTemperBackward)
FASTVAE_DEFINE_CPU(kick_drift_backward, KickDriftBackward)

}  // namespace fastvae::cpu
