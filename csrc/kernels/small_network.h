// Kernels of a whole trajectory through a small network: arguments, as in kernels.h, which includes this file, and
// where the parts of a block's tape lie.
#pragma once

#include <cstdint>

#include "math/activations.h"
#include "math/likelihoods.h"

namespace fastvae {

// A Hamiltonian flow through a multilayer perceptron whose weights stay in a core's cache: the whole trajectory of a
// block of kSmallFlowLanes samples in one go. A block's tape and tangents have the same parts on every device, but a
// CPU keeps a part as [samples, features], for products with rows of the weights, and CUDA as [feature, lane].
constexpr int kSmallFlowDepth = 8;  // layers at most

template <typename T>
constexpr int kSmallFlowLanes = 32 / static_cast<int>(sizeof(T));

template <typename T>
struct SmallNetwork {
  int depth;
  const T* weight[kSmallFlowDepth];  // [out, in]
  const T* bias[kSmallFlowDepth];    // [out] or null
  int64_t in[kSmallFlowDepth];
  int64_t out[kSmallFlowDepth];
  ActivationSpec activation[kSmallFlowDepth];  // of the last layer: identity
  LikelihoodSpec likelihood;                   // not categorical
};

// Index: blocks of lanes.
template <typename T>
struct SmallFlow {
  SmallNetwork<T> network;
  const T* z;       // [samples, dim]
  const T* rho;     // [samples, dim]
  const T* x;       // [samples, outputs]
  const T* step;    // [steps, dim]
  const T* alpha;   // [steps]
  T* z_steps;       // [steps + 1, samples, dim]
  T* rho_steps;     // [steps + 1, samples, dim]
  T* log_px;        // [samples]
  T* log_px_steps;  // [steps + 1, samples] or null
  T* tape;          // [blocks, steps + 1, SmallPointLayout::numel * lanes]
  int64_t samples;
  int64_t dim;
  int64_t steps;
};

// Index: tasks; each does its share of the blocks and has its own part of the parameters' gradients.
template <typename T>
struct SmallFlowBackward {
  SmallNetwork<T> network;
  const T* x;
  const T* step;
  const T* alpha;
  const T* tape;
  const T* grad_z_in;    // or null
  const T* grad_rho_in;  // or null
  const T* grad_log_px;  // or null
  T* grad_z;             // [samples, dim]
  T* grad_rho;           // [samples, dim]
  T* grad_x;             // [samples, outputs] or null
  T* step_terms;         // [steps, samples, dim] or null
  T* alpha_terms;        // [steps, samples] or null
  T* grad_parameters;    // [tasks, for each layer: weight, then bias] or null
  T* tangents;           // CUDA: workspace [tasks, steps + 1, SmallTangentLayout::numel, lanes]
  int64_t samples;
  int64_t dim;
  int64_t steps;
  int64_t tasks;
};

// Where the parts of one point of the trajectory lie in its tape, in features.
struct SmallPointLayout {
  int64_t z;
  int64_t rho;
  int64_t force;
  int64_t delta[kSmallFlowDepth];  // all layers
  int64_t h[kSmallFlowDepth];      // all but the last layer
  int64_t slope[kSmallFlowDepth];  // what Phi::slope reads: h, or a where keeps_input
  int64_t error[kSmallFlowDepth];  // what Phi::curvature reads: delta, or A^T delta where keeps_input
  int64_t numel;
};

template <typename T>
SmallPointLayout small_point_layout(const SmallNetwork<T>& network, int64_t dim) {
  SmallPointLayout at{0, dim, 2 * dim, {}, {}, {}, {}, 3 * dim};
  const auto next = [&](int l) {
    const int64_t place = at.numel;
    at.numel += network.out[l];
    return place;
  };
  for (int l = 0; l < network.depth; ++l) {
    at.delta[l] = next(l);
    if (l + 1 < network.depth) {
      const bool keeps = keeps_input(network.activation[l].kind);
      at.h[l] = next(l);
      at.slope[l] = keeps ? next(l) : at.h[l];
      at.error[l] = keeps ? next(l) : at.delta[l];
    }
  }
  return at;
}

// The same for the tangent and adjoint of one point.
struct SmallTangentLayout {
  int64_t u;
  int64_t delta_dot[kSmallFlowDepth];  // all layers
  int64_t hdot[kSmallFlowDepth];       // all but the last layer
  int64_t numel;
};

template <typename T>
SmallTangentLayout small_tangent_layout(const SmallNetwork<T>& network, int64_t dim) {
  SmallTangentLayout at{0, {}, {}, dim};
  for (int l = 0; l < network.depth; ++l) {
    at.delta_dot[l] = at.numel;
    at.numel += network.out[l];
    if (l + 1 < network.depth) {
      at.hdot[l] = at.numel;
      at.numel += network.out[l];
    }
  }
  return at;
}

template <typename T>
int64_t small_flow_parameter_numel(const SmallNetwork<T>& network) {
  int64_t numel = 0;
  for (int l = 0; l < network.depth; ++l) {
    numel += network.out[l] * (network.in[l] + 1);
  }
  return numel;
}

// Sums the tasks' parts of the parameters' gradients in their order. CUDA only.
template <typename T>
struct SmallFlowSum {
  const T* grad_parameters;  // as in SmallFlowBackward
  int64_t tasks;
  int depth;
  int64_t in[kSmallFlowDepth];
  int64_t out[kSmallFlowDepth];
  T* weight[kSmallFlowDepth];  // += [out, in], or null
  T* bias[kSmallFlowDepth];    // += [out], or null
};

}  // namespace fastvae
