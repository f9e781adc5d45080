// The pointwise half of the four sweeps, one pass over memory each (kernels.h gives the formulas).
//
// Cost per element: bias_activation and activation_reverse read 2 and write 1, tangent reads 3 and writes 2, adjoint
// reads 3 and writes 1; 1 to 2 exponentials (about 12 FLOPs) for smooth activations.
#include "../kernels.h"
#include "clones.h"

namespace fastvae::cpu {

template <Activation kind, typename T>
FASTVAE_INLINE void bias_activation_rows(const BiasActivation<T>& args, int64_t begin, int64_t end) {
  const math::Phi<kind, T> phi(args.activation);
  const int64_t n = args.channels;
  for (int64_t row = begin; row < end; ++row) {
    const T* a = args.a + row * n;
    T* h = args.h + row * n;
    if (args.bias != nullptr && args.kept != nullptr) {
      T* kept = args.kept + row * n;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T value = a[j] + args.bias[j];
        kept[j] = value;
        h[j] = phi.value(value);
      }
    } else if (args.bias != nullptr) {
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        h[j] = phi.value(a[j] + args.bias[j]);
      }
    } else {
      if (args.kept != nullptr) {
        T* kept = args.kept + row * n;
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) {
          kept[j] = a[j];
        }
      }
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        h[j] = phi.value(a[j]);
      }
    }
  }
}

template <Activation kind, typename T>
FASTVAE_INLINE void activation_reverse_elements(const ActivationReverse<T>& args, int64_t begin, int64_t end) {
  const math::Phi<kind, T> phi(args.activation);
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    args.delta[i] = phi.slope(args.s[i]) * args.g[i];
  }
}

template <Activation kind, typename T>
FASTVAE_INLINE void activation_tangent_elements(const ActivationTangent<T>& args, int64_t begin, int64_t end) {
  const math::Phi<kind, T> phi(args.activation);
  if (is_piecewise_linear(kind)) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      args.hdot[i] = phi.slope(args.s[i]) * args.adot[i];
    }
    return;
  }
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const T adot = args.adot[i];
    const T s = args.s[i];
    args.curvature[i] = phi.curvature(s, args.e[i]) * adot;
    args.hdot[i] = phi.slope(s) * adot;
  }
}

template <Activation kind, typename T>
FASTVAE_INLINE void activation_adjoint_elements(const ActivationAdjoint<T>& args, int64_t begin, int64_t end) {
  const math::Phi<kind, T> phi(args.activation);
  if (is_piecewise_linear(kind)) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      args.delta_dot[i] = phi.slope(args.s[i]) * args.g[i];
    }
    return;
  }
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    args.delta_dot[i] = phi.slope(args.s[i]) * args.g[i] + args.curvature[i];
  }
}

#define FASTVAE_DEFINE_BY_ACTIVATION(NAME, ARGS, LOOP)                                   \
  template <typename T>                                                                  \
  FASTVAE_INLINE void NAME##_template(const ARGS<T>& args, int64_t begin, int64_t end) { \
    switch (args.activation.kind) { FASTVAE_EACH_ACTIVATION(LOOP) }                      \
  }                                                                                      \
  FASTVAE_DEFINE_CPU(NAME, ARGS)

FASTVAE_DEFINE_BY_ACTIVATION(bias_activation, BiasActivation, bias_activation_rows)
FASTVAE_DEFINE_BY_ACTIVATION(activation_reverse, ActivationReverse, activation_reverse_elements)
FASTVAE_DEFINE_BY_ACTIVATION(activation_tangent, ActivationTangent, activation_tangent_elements)
FASTVAE_DEFINE_BY_ACTIVATION(activation_adjoint, ActivationAdjoint, activation_adjoint_elements)

}  // namespace fastvae::cpu
