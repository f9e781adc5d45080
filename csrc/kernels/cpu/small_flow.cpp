// The Hamiltonian flow through a small multilayer perceptron, forward: every step of a block of samples at once, with
// weights and activations in the core's cache and no call outside.
//
// Cost a sample: (steps + 1) * 2 passes of 2 * (weights) FLOPs; reads the weights from L1/L2, writes the tape once
// (SmallPointLayout).
#include "small_flow.h"

#include <algorithm>

#include "../math/leapfrog.h"

namespace fastvae::cpu {

// Fills the tape of `samples` points from their z; log_prob [samples] may be null.
template <typename T>
FASTVAE_INLINE void sweep_point(const SmallNetwork<T>& network, const SmallWeights<T>& weights,
                                const SmallPoint<T>& point, int64_t samples, int64_t dim, const T* x, T* log_prob) {
  const int last = network.depth - 1;
  const T* in = point.z;
  for (int l = 0; l < last; ++l) {
    T* h = point.h[l];
    weights.forward(network, l, in, samples, h);
    T* kept = point.slope[l] == h ? nullptr : point.slope[l];
    bias_activation(BiasActivation<T>{h, network.bias[l], h, kept, samples, network.out[l], network.activation[l]}, 0,
                    samples);
    in = h;
  }
  T* output = point.delta[last];
  weights.forward(network, last, in, samples, output);
  head_residual(HeadResidual<T>{output, network.bias[last], x, output, log_prob, samples, 1, network.out[last],
                                network.likelihood},
                0, samples);
  for (int l = last; l > 0; --l) {
    T* g = point.error[l - 1];  // delta itself where A^T delta is not kept
    weights.reverse(network, l, point.delta[l], samples, g);
    const int64_t size = samples * network.in[l];
    activation_reverse(ActivationReverse<T>{g, point.slope[l - 1], point.delta[l - 1], size, network.activation[l - 1]},
                       0, size);
  }
  weights.reverse(network, 0, point.delta[0], samples, point.force);
  for (int64_t i = 0; i < samples * dim; ++i) {
    point.force[i] -= point.z[i];
  }
}

template <typename T>
FASTVAE_INLINE void small_flow_template(const SmallFlow<T>& args, int64_t begin, int64_t end) {
  constexpr int kBlock = kSmallFlowLanes<T>;
  const SmallNetwork<T>& network = args.network;
  const int64_t dim = args.dim;
  const int64_t outputs = network.out[network.depth - 1];
  const SmallPointLayout layout = small_point_layout(network, dim);
  const int64_t point_size = layout.numel * kBlock;
  struct Memory {
    Memory(Carver carver, const SmallFlow<T>& args) : weights(args.network, carver), bytes(carver.used()) {}
    SmallWeights<T> weights;
    int64_t bytes;
  };
  Scratch scratch(Memory(Carver(nullptr), args).bytes);
  Memory memory(Carver(scratch.data()), args);
  memory.weights.fill(network);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock;
    const int64_t samples = std::min<int64_t>(kBlock, args.samples - first);
    const int64_t size = samples * dim;
    T* tape = args.tape + block * (args.steps + 1) * point_size;
    if (samples < kBlock) {
      // The tape is an output of the op, and the same in every run to its last number.
      std::fill_n(tape, (args.steps + 1) * point_size, T(0));
    }
    SmallPoint<T> point = small_point(layout, network.depth, tape);
    std::copy_n(args.z + first * dim, size, point.z);
    std::copy_n(args.rho + first * dim, size, point.rho);
    for (int64_t k = 0; k <= args.steps; ++k) {
      const T* step = k == 0 ? nullptr : args.step + (k - 1) * dim;
      if (k > 0) {
        const SmallPoint<T> before = point;
        point = small_point(layout, network.depth, tape + k * point_size);
        for (int64_t i = 0; i < size; i += dim) {
          for (int64_t j = 0; j < dim; ++j) {
            const math::Drifted<T> next =
                math::kick_drift(before.z[i + j], before.rho[i + j], before.force[i + j], step[j]);
            point.z[i + j] = next.z;
            point.rho[i + j] = next.rho_half;
          }
        }
      }
      T* log_prob = k == args.steps                ? args.log_px + first
                    : args.log_px_steps != nullptr ? args.log_px_steps + k * args.samples + first
                                                   : nullptr;
      sweep_point(network, memory.weights, point, samples, dim, args.x + first * outputs, log_prob);
      if (k > 0) {
        for (int64_t i = 0; i < size; i += dim) {
          for (int64_t j = 0; j < dim; ++j) {
            point.rho[i + j] = math::kick_temper(point.rho[i + j], point.force[i + j], step[j], args.alpha[k - 1]);
          }
        }
      }
      std::copy_n(point.z, size, args.z_steps + (k * args.samples + first) * dim);
      std::copy_n(point.rho, size, args.rho_steps + (k * args.samples + first) * dim);
    }
    if (args.log_px_steps != nullptr) {
      std::copy_n(args.log_px + first, samples, args.log_px_steps + args.steps * args.samples + first);
    }
  }
}

FASTVAE_DEFINE_CPU(small_flow, SmallFlow)

}  // namespace fastvae::cpu
