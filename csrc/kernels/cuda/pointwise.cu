// The pointwise half of the four sweeps on a GPU (kernels.h gives the formulas; cpu/pointwise.cpp is the twin).
//
// One thread an element, memory bound: bytes as in the CPU file, one pass. The constants of an activation are worked
// out on the host.
#include "launch.cuh"

namespace fastvae::cuda {

template <Activation kind, typename T>
__global__ void bias_activation_kernel(const BiasActivation<T> args, const math::Phi<kind, T> phi) {
  Walk at(global_thread(), global_threads(), args.rows * args.channels, args.channels);
  for (; at.inside(); at.next()) {
    const T value = args.bias == nullptr ? args.a[at.i] : args.a[at.i] + args.bias[at.column];
    if (args.kept != nullptr) {
      args.kept[at.i] = value;
    }
    args.h[at.i] = phi.value(value);
  }
}

template <Activation kind, typename T>
__global__ void activation_reverse_kernel(const ActivationReverse<T> args, const math::Phi<kind, T> phi) {
  for (int64_t i = global_thread(); i < args.size; i += global_threads()) {
    args.delta[i] = phi.slope(args.s[i]) * args.g[i];
  }
}

template <Activation kind, typename T>
__global__ void activation_tangent_kernel(const ActivationTangent<T> args, const math::Phi<kind, T> phi) {
  for (int64_t i = global_thread(); i < args.size; i += global_threads()) {
    const T adot = args.adot[i];
    const T s = args.s[i];
    if constexpr (!is_piecewise_linear(kind)) {
      args.curvature[i] = phi.curvature(s, args.e[i]) * adot;
    }
    args.hdot[i] = phi.slope(s) * adot;
  }
}

template <Activation kind, typename T>
__global__ void activation_adjoint_kernel(const ActivationAdjoint<T> args, const math::Phi<kind, T> phi) {
  for (int64_t i = global_thread(); i < args.size; i += global_threads()) {
    T value = phi.slope(args.s[i]) * args.g[i];
    if constexpr (!is_piecewise_linear(kind)) {
      value += args.curvature[i];
    }
    args.delta_dot[i] = value;
  }
}

#define FASTVAE_CUDA_CASE(KIND, NAME, COUNT)                                                  \
  case Activation::KIND:                                                                      \
    launch(#NAME, NAME##_kernel<Activation::KIND, T>, grid_for_elements(COUNT), stream, args, \
           math::Phi<Activation::KIND, T>(args.activation));                                  \
    break;

#define FASTVAE_DEFINE_BY_ACTIVATION(NAME, ARGS, COUNT)                                        \
  template <typename T>                                                                        \
  void NAME##_launch(const ARGS<T>& args, Stream stream) {                                     \
    switch (args.activation.kind) { FASTVAE_ACTIVATION_KINDS(FASTVAE_CUDA_CASE, NAME, COUNT) } \
  }                                                                                            \
  FASTVAE_DEFINE_CUDA(NAME, ARGS)

FASTVAE_DEFINE_BY_ACTIVATION(bias_activation, BiasActivation, args.rows* args.channels)
FASTVAE_DEFINE_BY_ACTIVATION(activation_reverse, ActivationReverse, args.size)
FASTVAE_DEFINE_BY_ACTIVATION(activation_tangent, ActivationTangent, args.size)
FASTVAE_DEFINE_BY_ACTIVATION(activation_adjoint, ActivationAdjoint, args.size)

}  // namespace fastvae::cuda
