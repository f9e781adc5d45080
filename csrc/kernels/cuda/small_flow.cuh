// The pieces that the two kernels of a small network's flow share (small_flow.cu): a thread's lanes, activations made
// on the host, the plan of shared memory, and the moves between it and the tensors.
#pragma once

#include <cstring>
#include <type_traits>

#include "../math/leapfrog.h"
#include "launch.cuh"

namespace fastvae::cuda {

constexpr int kWarps = kThreads / kWarp;

// The lanes that a thread has of a feature.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  T lane[kWidth];
};

template <typename T>
constexpr int kGroups = kSmallFlowLanes<T> / Pack<T>::kWidth;

template <typename T>
__device__ Pack<T>& pack_at(T* features, int64_t feature, int group) {
  return reinterpret_cast<Pack<T>*>(features)[feature * kGroups<T> + group];
}

template <typename T>
__device__ const Pack<T>& pack_at(const T* features, int64_t feature, int group) {
  return reinterpret_cast<const Pack<T>*>(features)[feature * kGroups<T> + group];
}

// Any Phi of math/activations.h, made on the host, whose divisions a GPU would repeat in every thread.
template <typename T>
struct AnyPhi {
  Activation kind;
  alignas(T) unsigned char bytes[5 * sizeof(T)];
};

template <Activation kind, typename T>
void store_phi(const ActivationSpec& spec, AnyPhi<T>& any) {
  using Phi = math::Phi<kind, T>;
  static_assert(sizeof(Phi) <= sizeof(any.bytes) && std::is_trivially_copyable_v<Phi>);
  const Phi phi(spec);
  std::memcpy(any.bytes, &phi, sizeof(Phi));
}

template <typename T>
AnyPhi<T> any_phi(const ActivationSpec& spec) {
  AnyPhi<T> any{spec.kind, {}};
  switch (spec.kind) {
#define FASTVAE_STORE_PHI(KIND, ...)        \
  case Activation::KIND:                    \
    store_phi<Activation::KIND>(spec, any); \
    break;
    FASTVAE_ACTIVATION_KINDS(FASTVAE_STORE_PHI)
#undef FASTVAE_STORE_PHI
  }
  return any;
}

template <typename T, typename Use>
__device__ void with_phi(const AnyPhi<T>& any, const Use& use) {
  switch (any.kind) {
#define FASTVAE_USE_PHI(KIND, ...)                                            \
  case Activation::KIND:                                                      \
    use(*reinterpret_cast<const math::Phi<Activation::KIND, T>*>(any.bytes)); \
    break;
    FASTVAE_ACTIVATION_KINDS(FASTVAE_USE_PHI)
#undef FASTVAE_USE_PHI
  }
}

// What both kernels know of the network, and where things lie in shared memory (in numbers). Features are counted in
// int: they fit in shared memory, which small_flow_fits has checked.
template <typename T>
struct Plan {
  SmallPointLayout point;
  SmallTangentLayout tangent;
  AnyPhi<T> phi[kSmallFlowDepth];
  int weight[kSmallFlowDepth];  // [out, row]
  int bias[kSmallFlowDepth];
  int row[kSmallFlowDepth];  // `in`, or one more to make it odd
  int x, grad_x;             // [outputs, lanes]
  int buffer[2];             // [widest, lanes], what one layer hands to the next
  int z, rho;                // [dim, lanes]; the backward kernel keeps u and the cotangent of rho there
  int grad_z, momentum, step_terms, alpha_terms;
  int partial;  // [warps, one Pack]
  int64_t numel;
};

template <typename T>
Plan<T> make_plan(const SmallNetwork<T>& network, int64_t dim) {
  Plan<T> plan{};
  plan.point = small_point_layout(network, dim);
  plan.tangent = small_tangent_layout(network, dim);
  const auto take = [&](int64_t count) {
    const int64_t place = plan.numel;
    plan.numel += (count + Pack<T>::kWidth - 1) / Pack<T>::kWidth * Pack<T>::kWidth;
    return static_cast<int>(place);
  };
  int64_t widest = 0;
  for (int l = 0; l < network.depth; ++l) {
    const int64_t row = network.in[l] + (network.in[l] % 2 == 0 ? 1 : 0);
    plan.phi[l] = any_phi<T>(network.activation[l]);
    plan.row[l] = static_cast<int>(row);
    plan.weight[l] = take(network.out[l] * row);
    plan.bias[l] = take(network.out[l]);
    widest = std::max({widest, network.in[l], network.out[l]});
  }
  constexpr int64_t kLanes = kSmallFlowLanes<T>;
  for (int* outputs : {&plan.x, &plan.grad_x}) {
    *outputs = take(network.out[network.depth - 1] * kLanes);
  }
  for (int& buffer : plan.buffer) {
    buffer = take(widest * kLanes);
  }
  for (int* state : {&plan.z, &plan.rho, &plan.grad_z, &plan.momentum, &plan.step_terms, &plan.alpha_terms}) {
    *state = take(dim * kLanes);
  }
  plan.partial = take(int64_t{kWarps} * Pack<T>::kWidth);
  return plan;
}

// A thread's share of [features, lanes]: one group of lanes of every `stride`-th feature. The groups alternate from
// warp to warp, so that a layer of few features still keeps all schedulers busy.
template <typename T>
struct Share {
  int group = static_cast<int>(threadIdx.x) / kWarp % kGroups<T>;
  int first = static_cast<int>(threadIdx.x) / kWarp / kGroups<T> * kWarp + static_cast<int>(threadIdx.x) % kWarp;
  static constexpr int kStride = kThreads / kGroups<T>;
  static_assert(kWarps % kGroups<T> == 0);
};

// sum_k w[k * step] in[k] of a group of lanes.
template <typename T>
__device__ Pack<T> product(const T* w, int step, const T* in, int inner, int group) {
  Pack<T> sum{};
#pragma unroll 4
  for (int k = 0; k < inner; ++k) {
    const T factor = w[k * step];
    const Pack<T> value = pack_at(in, k, group);
    for (int i = 0; i < Pack<T>::kWidth; ++i) {
      sum.lane[i] += factor * value.lane[i];
    }
  }
  return sum;
}

template <typename T>
__device__ Pack<T> product_with_bias(const T* w, T bias, const T* in, int inner, int group) {
  Pack<T> sum = product(w, 1, in, inner, group);
  for (int i = 0; i < Pack<T>::kWidth; ++i) {
    sum.lane[i] += bias;
  }
  return sum;
}

template <typename T>
__device__ void load_parameters(const SmallNetwork<T>& network, const Plan<T>& plan, T* shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int l = 0; l < network.depth; ++l) {
    const int in = static_cast<int>(network.in[l]);
    const int out = static_cast<int>(network.out[l]);
    for (int r = warp; r < out; r += kWarps) {
      for (int c = lane; c < in; c += kWarp) {
        shared[plan.weight[l] + r * plan.row[l] + c] = network.weight[l][r * in + c];
      }
    }
    for (int r = static_cast<int>(threadIdx.x); r < out; r += kThreads) {
      shared[plan.bias[l] + r] = network.bias[l] == nullptr ? T(0) : network.bias[l][r];
    }
  }
}

// [samples, features] rows to [feature, lane]. Lanes beyond the last sample repeat it, as on the CPU.
template <typename T>
__device__ void load_tile(const T* rows, int64_t first, int64_t samples, int features, T* tile) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  for (int lane = static_cast<int>(threadIdx.x) / kWarp; lane < kLanes; lane += kWarps) {
    const int64_t sample = first + lane < samples ? first + lane : samples - 1;
    for (int j = static_cast<int>(threadIdx.x) % kWarp; j < features; j += kWarp) {
      tile[j * kLanes + lane] = rows[sample * features + j];
    }
  }
}

// One feature of cotangents, of which the lanes beyond the last sample have none; rows may be null.
template <typename T>
__device__ Pack<T> load_cotangent(const T* rows, int64_t first, int64_t samples, int features, int j, int group) {
  Pack<T> value{};
  for (int i = 0; i < Pack<T>::kWidth; ++i) {
    const int64_t sample = first + group * Pack<T>::kWidth + i;
    if (rows != nullptr && sample < samples) {
      value.lane[i] = rows[sample * features + j];
    }
  }
  return value;
}

// One feature back to [samples, features] rows, without the lanes beyond the last sample.
template <typename T>
__device__ void store_lanes(const Pack<T>& value, int64_t first, int64_t samples, int features, int j, int group,
                            T* rows) {
  for (int i = 0; i < Pack<T>::kWidth; ++i) {
    const int64_t sample = first + group * Pack<T>::kWidth + i;
    if (sample < samples) {
      rows[sample * features + j] = value.lane[i];
    }
  }
}

}  // namespace fastvae::cuda
