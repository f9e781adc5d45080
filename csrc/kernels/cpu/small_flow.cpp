// The Hamiltonian flow through a small multilayer perceptron, forward: every step of a block of samples at once, with
// weights and activations in the core's cache and no call outside.
//
// Cost a sample: (steps + 1) * 2 passes of 2 * (weights) FLOPs; reads the weights from L1/L2, writes the tape once
// (SmallPointLayout).
#include "small_flow.h"

#include <algorithm>

#include "../math/leapfrog.h"

namespace fastvae::cpu {

// ll of every lane at the natural parameters a.
template <typename Head, typename T>
FASTVAE_INLINE void lane_log_prob(const SmallNetwork<T>& network, const T* a, const T* x, T* log_prob) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  const Head head(network.likelihood);
  T sum[kLanes] = {};
  for (int64_t j = 0; j < network.out[network.depth - 1]; ++j) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sum[lane] += head.both(a[j * kLanes + lane], x[j * kLanes + lane]).log_prob;
    }
  }
  std::copy_n(sum, kLanes, log_prob);
}

// Fills the point's tape from its z; log_prob [lanes] may be null.
template <typename T>
FASTVAE_INLINE void sweep_point(const SmallNetwork<T>& network, const PackedWeights<T>& weights,
                                const SmallPoint<T>& point, int64_t dim, const T* x, T* log_prob) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  const int last = network.depth - 1;
  const T* in = point.z;
  for (int l = 0; l < last; ++l) {
    small_product<true>(weights.forward[l], in, point.h[l], network.out[l], network.in[l]);
    T* kept = point.slope[l] == point.h[l] ? nullptr : point.slope[l];
    bias_activation(
        BiasActivation<T>{point.h[l], nullptr, point.h[l], kept, 1, network.out[l] * kLanes, network.activation[l]}, 0,
        1);
    in = point.h[l];
  }
  const int64_t outputs = network.out[last];
  small_product<true>(weights.forward[last], in, point.delta[last], outputs, network.in[last]);
  if (log_prob != nullptr) {
    if (network.likelihood.kind == Likelihood::kBernoulli) {
      lane_log_prob<math::BernoulliHead<T>>(network, point.delta[last], x, log_prob);
    } else {
      lane_log_prob<math::GaussianHead<T>>(network, point.delta[last], x, log_prob);
    }
  }
  head_residual(HeadResidual<T>{point.delta[last], nullptr, x, point.delta[last], nullptr, 1, 1, outputs * kLanes,
                                network.likelihood},
                0, 1);
  for (int l = last; l > 0; --l) {
    T* g = point.error[l - 1];  // delta itself where A^T delta is not kept
    small_product<false>(weights.reverse[l], point.delta[l], g, network.in[l], network.out[l]);
    activation_reverse(ActivationReverse<T>{g, point.slope[l - 1], point.delta[l - 1], network.in[l] * kLanes,
                                            network.activation[l - 1]},
                       0, network.in[l] * kLanes);
  }
  small_product<false>(weights.reverse[0], point.delta[0], point.force, dim, network.out[0]);
  for (int64_t i = 0; i < dim * kLanes; ++i) {
    point.force[i] -= point.z[i];
  }
}

template <typename T>
FASTVAE_INLINE void small_flow_template(const SmallFlow<T>& args, int64_t begin, int64_t end) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  const SmallNetwork<T>& network = args.network;
  const int64_t dim = args.dim;
  const int64_t outputs = network.out[network.depth - 1];
  const SmallPointLayout layout = small_point_layout(network, dim);
  const int64_t point_size = layout.numel * kLanes;
  struct Memory {
    Memory(Carver carver, const SmallFlow<T>& args, int64_t outputs)
        : weights(args.network, carver), x(carver.take<T>(outputs * kLanes)), bytes(carver.used()) {}
    PackedWeights<T> weights;
    T* x;
    int64_t bytes;
  };
  Scratch scratch(Memory(Carver(nullptr), args, outputs).bytes);
  Memory memory(Carver(scratch.data()), args, outputs);
  memory.weights.fill(network);
  T log_prob[kLanes] = {};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kLanes;
    T* tape = args.tape + block * (args.steps + 1) * point_size;
    load_block(args.x, first, args.samples, outputs, memory.x);
    SmallPoint<T> point = small_point(layout, network.depth, tape);
    load_block(args.z, first, args.samples, dim, point.z);
    load_block(args.rho, first, args.samples, dim, point.rho);
    for (int64_t k = 0; k <= args.steps; ++k) {
      if (k > 0) {
        const SmallPoint<T> before = point;
        point = small_point(layout, network.depth, tape + k * point_size);
        for (int64_t j = 0; j < dim; ++j) {
          const T step = args.step[(k - 1) * dim + j];
          for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t i = j * kLanes + lane;
            const math::Drifted<T> next = math::kick_drift(before.z[i], before.rho[i], before.force[i], step);
            point.z[i] = next.z;
            point.rho[i] = next.rho_half;
          }
        }
      }
      const bool wants = k == args.steps || args.log_px_steps != nullptr;
      sweep_point(network, memory.weights, point, dim, memory.x, wants ? log_prob : nullptr);
      if (k > 0) {
        const T alpha = args.alpha[k - 1];
        for (int64_t j = 0; j < dim; ++j) {
          const T step = args.step[(k - 1) * dim + j];
          for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t i = j * kLanes + lane;
            point.rho[i] = math::kick_temper(point.rho[i], point.force[i], step, alpha);
          }
        }
      }
      store_block(point.z, first, args.samples, dim, args.z_steps + k * args.samples * dim);
      store_block(point.rho, first, args.samples, dim, args.rho_steps + k * args.samples * dim);
      if (args.log_px_steps != nullptr) {
        store_block(log_prob, first, args.samples, 1, args.log_px_steps + k * args.samples);
      }
    }
    store_block(log_prob, first, args.samples, 1, args.log_px);
  }
}

FASTVAE_DEFINE_CPU(small_flow, SmallFlow)

}  // namespace fastvae::cpu
