// The pointwise half of the Jacobian sweeps on a GPU (kernels.h gives the formulas; cpu/jacobian.cpp is the twin).
//
// A thread owns one column of one sample and walks its latents, so that phi' and phi'' are worked out once for all of
// them and their sums need no second thread; neighbours read neighbouring columns. Memory bound: bytes as in the CPU
// file. The terms of a chunk of columns are one block's, summed in a fixed order.
#include "../math/jacobian.h"

#include "launch.cuh"

namespace fastvae::cuda {

template <Activation kind, typename T>
__global__ void jacobian_tangent_kernel(const JacobianTangent<T> args, const math::Phi<kind, T> phi) {
  const int64_t n = args.numel;
  for (int64_t k = global_thread(); k < args.samples * n; k += global_threads()) {
    const int64_t sample = k / n;
    const int64_t column = k % n;
    const T slope = args.s == nullptr ? T(1) : phi.slope(args.s[k]);
    const T* adot = args.adot + (args.shared ? 0 : sample * args.latents * n) + column;
    T* hdot = args.hdot + sample * args.latents * n + column;
    for (int64_t i = 0; i < args.latents; ++i) {
      hdot[i * n] = slope * adot[i * n];
    }
  }
}

template <Activation kind, typename T>
__global__ void jacobian_head_kernel(const JacobianHead<T> args, const math::Phi<kind, T> psi) {
  const int64_t n = args.numel;
  const int64_t chunks = jacobian_chunks(n);
  for (int64_t index = blockIdx.x; index < args.samples * chunks; index += gridDim.x) {
    const int64_t sample = index / chunks;
    const int64_t from = index % chunks * kJacobianChunk;
    const int64_t to = from + kJacobianChunk < n ? from + kJacobianChunk : n;
    const T weight = args.weight == nullptr ? T(1) : args.weight[sample];
    T sum = T(0);
    for (int64_t column = from + threadIdx.x; column < to; column += blockDim.x) {
      const int64_t output = sample * args.outputs + args.first + column;
      const math::Bend<T> bend = args.s == nullptr ? math::Bend<T>{T(1), T(0)} : math::bend(psi, args.s[output]);
      T abar = T(0);
      for (int64_t i = 0; i < args.latents; ++i) {
        const int64_t at = (sample * args.latents + i) * n + column;
        const T adot = args.adot[at];
        const T ydot = bend.slope * adot;
        const math::JacobianTerm<T> term = math::jacobian_term(ydot, args.squared);
        sum += term.value;
        if (args.adotbar != nullptr) {
          const T cotangent = weight * term.slope;
          args.adotbar[at] = bend.slope * cotangent;
          abar += bend.factor * (keeps_input(kind) ? adot : ydot) * cotangent;
        }
      }
      if (args.abar != nullptr) {
        args.abar[output] = abar;
      }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
      args.terms[index] = sum;
    }
  }
}

template <Activation kind, typename T>
__global__ void jacobian_adjoint_kernel(const JacobianAdjoint<T> args, const math::Phi<kind, T> phi) {
  const int64_t n = args.numel;
  for (int64_t k = global_thread(); k < args.samples * n; k += global_threads()) {
    const int64_t sample = k / n;
    const int64_t column = k % n;
    const int64_t rows = sample * args.latents * n + column;
    const math::Bend<T> bend = args.s == nullptr ? math::Bend<T>{T(1), T(0)} : math::bend(phi, args.s[k]);
    T abar = args.hbar == nullptr ? T(0) : bend.slope * args.hbar[k];
    for (int64_t i = 0; i < args.latents; ++i) {
      const T hdotbar = args.hdotbar[rows + i * n];
      if (args.e != nullptr) {
        abar += bend.factor * args.e[args.shared ? i * n + column : rows + i * n] * hdotbar;
      }
      args.adotbar[rows + i * n] = bend.slope * hdotbar;
    }
    if (args.abar != nullptr) {
      args.abar[k] = abar;
    }
  }
}

#define FASTVAE_CUDA_CASE(KIND, NAME, BLOCKS)                               \
  case Activation::KIND:                                                    \
    launch(#NAME, NAME##_kernel<Activation::KIND, T>, BLOCKS, stream, args, \
           math::Phi<Activation::KIND, T>(args.activation));                \
    break;

#define FASTVAE_DEFINE_BY_ACTIVATION(NAME, ARGS, BLOCKS)                                        \
  template <typename T>                                                                         \
  void NAME##_launch(const ARGS<T>& args, Stream stream) {                                      \
    switch (args.activation.kind) { FASTVAE_ACTIVATION_KINDS(FASTVAE_CUDA_CASE, NAME, BLOCKS) } \
  }                                                                                             \
  FASTVAE_DEFINE_CUDA(NAME, ARGS)

FASTVAE_DEFINE_BY_ACTIVATION(jacobian_tangent, JacobianTangent, grid_for_elements(args.samples* args.numel))
FASTVAE_DEFINE_BY_ACTIVATION(jacobian_head, JacobianHead, Grid{args.samples * jacobian_chunks(args.numel)})
FASTVAE_DEFINE_BY_ACTIVATION(jacobian_adjoint, JacobianAdjoint, grid_for_elements(args.samples* args.numel))

}  // namespace fastvae::cuda
