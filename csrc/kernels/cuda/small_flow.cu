// The Hamiltonian flow through a small multilayer perceptron on a GPU: the whole trajectory in one launch each way
// (cpu/small_flow.cpp and cpu/small_flow_backward.cpp are the twins), and a small one that sums the gradients.
//
// A block copies the weights into its shared memory and takes kSmallFlowLanes samples through all steps; the general
// route launches a dozen kernels a step, which for such networks do next to nothing. A thread computes one feature of
// 16 bytes of lanes: a load of a weight (rows of odd length, so that neither pass over them meets a bank conflict) and
// a broadcast load of four lanes for four multiply-adds. What belongs to a feature, the activation's constants, the
// tape, the leapfrog step, is worked on by the thread that has just computed it, so a pass over a layer costs one
// __syncthreads().
//
// Cost a sample: as on the CPU, (steps + 1) * 2 passes of 2 * (weights) FLOPs forward and twice that backward; the tape
// is written once and read twice, the tangents are written and read once, the weights are read once a block.
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

template <typename T>
bool fits(const SmallNetwork<T>& network, int64_t dim, int device) {
  int limit = 0;
  if (cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    cudaGetLastError();  // no such device: a fake tensor asks
    return false;
  }
  return make_plan(network, dim).numel * static_cast<int64_t>(sizeof(T)) <= limit;
}

bool small_flow_fits(const SmallNetwork<float>& network, int64_t dim, int device) { return fits(network, dim, device); }
bool small_flow_fits(const SmallNetwork<double>& network, int64_t dim, int device) {
  return fits(network, dim, device);
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

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename Head, typename T>
__global__ void small_flow_kernel(const __grid_constant__ SmallFlow<T> args, const __grid_constant__ Plan<T> plan,
                                  const Head head) {
  FASTVAE_DYNAMIC_SHARED(T, shared);
  constexpr int kLanes = kSmallFlowLanes<T>;
  constexpr int kWidth = Pack<T>::kWidth;
  const SmallNetwork<T>& network = args.network;
  const Share<T> share;
  const int dim = static_cast<int>(args.dim);
  const int last = network.depth - 1;
  const int outputs = static_cast<int>(network.out[last]);
  const int64_t tiles = (args.samples + kLanes - 1) / kLanes;
  const int64_t rows_of_step = args.samples * dim;
  T* const z = shared + plan.z;
  T* const rho = shared + plan.rho;
  load_parameters(network, plan, shared);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kLanes;
    __syncthreads();  // the parameters are there; the last tile is done
    load_tile(args.x, first, args.samples, outputs, shared + plan.x);
    load_tile(args.z, first, args.samples, dim, z);
    load_tile(args.rho, first, args.samples, dim, rho);
    __syncthreads();
    for (int64_t k = 0; k <= args.steps; ++k) {
      // rho holds rho_0 or the momentum in the middle of step k - 1.
      T* const tape = args.tape + (tile * (args.steps + 1) + k) * plan.point.numel * kLanes;
      const bool wants_log_prob = k == args.steps || args.log_px_steps != nullptr;
      const T* in = z;
      T* out = shared + plan.buffer[0];
      T* spare = shared + plan.buffer[1];
      const auto pass_on = [&] {
        __syncthreads();
        T* const next = in == z ? spare : const_cast<T*>(in);
        in = out;
        out = next;
      };
      for (int l = 0; l < last; ++l) {
        const T* const w = shared + plan.weight[l];
        for (int r = share.first; r < network.out[l]; r += share.kStride) {
          const Pack<T> a = product_with_bias(w + r * plan.row[l], shared[plan.bias[l] + r], in,
                                              static_cast<int>(network.in[l]), share.group);
          Pack<T> h;
          with_phi(plan.phi[l], [&](const auto& phi) {
            for (int i = 0; i < kWidth; ++i) {
              h.lane[i] = phi.value(a.lane[i]);
            }
          });
          pack_at(tape, plan.point.h[l] + r, share.group) = h;
          if (plan.point.slope[l] != plan.point.h[l]) {
            pack_at(tape, plan.point.slope[l] + r, share.group) = a;
          }
          pack_at(out, r, share.group) = h;
        }
        pass_on();
      }
      Pack<T> log_prob{};
      for (int r = share.first; r < outputs; r += share.kStride) {
        const Pack<T> a =
            product_with_bias(shared + plan.weight[last] + r * plan.row[last], shared[plan.bias[last] + r], in,
                              static_cast<int>(network.in[last]), share.group);
        const Pack<T> x = pack_at(shared + plan.x, r, share.group);
        Pack<T> residual;
        for (int i = 0; i < kWidth; ++i) {
          if (wants_log_prob) {
            const math::HeadValue<T> both = head.both(a.lane[i], x.lane[i]);
            log_prob.lane[i] += both.log_prob;
            residual.lane[i] = both.residual;
          } else {
            residual.lane[i] = head.residual(a.lane[i], x.lane[i]);
          }
        }
        pack_at(tape, plan.point.delta[last] + r, share.group) = residual;
        pack_at(out, r, share.group) = residual;
      }
      if (wants_log_prob) {
        for (int i = 0; i < kWidth; ++i) {
          log_prob.lane[i] = warp_sum(log_prob.lane[i]);
        }
        if (threadIdx.x % kWarp == 0) {
          pack_at(shared + plan.partial, threadIdx.x / kWarp / kGroups<T>, share.group) = log_prob;
        }
      }
      pass_on();
      if (wants_log_prob && threadIdx.x < kLanes && first + threadIdx.x < args.samples) {
        T sum = T(0);
        for (int warp = 0; warp < kWarps / kGroups<T>; ++warp) {
          sum += shared[plan.partial + warp * kLanes + threadIdx.x];
        }
        if (args.log_px_steps != nullptr) {
          args.log_px_steps[k * args.samples + first + threadIdx.x] = sum;
        }
        if (k == args.steps) {
          args.log_px[first + threadIdx.x] = sum;
        }
      }
      for (int l = last; l > 0; --l) {
        for (int r = share.first; r < network.in[l]; r += share.kStride) {
          const Pack<T> s = pack_at(tape, plan.point.slope[l - 1] + r, share.group);  // this thread has written it
          const Pack<T> g =
              product(shared + plan.weight[l] + r, plan.row[l], in, static_cast<int>(network.out[l]), share.group);
          Pack<T> delta;
          with_phi(plan.phi[l - 1], [&](const auto& phi) {
            for (int i = 0; i < kWidth; ++i) {
              delta.lane[i] = phi.slope(s.lane[i]) * g.lane[i];
            }
          });
          pack_at(tape, plan.point.delta[l - 1] + r, share.group) = delta;
          if (plan.point.error[l - 1] != plan.point.delta[l - 1]) {
            pack_at(tape, plan.point.error[l - 1] + r, share.group) = g;
          }
          pack_at(out, r, share.group) = delta;
        }
        pass_on();
      }
      for (int j = share.first; j < dim; j += share.kStride) {
        const Pack<T> g =
            product(shared + plan.weight[0] + j, plan.row[0], in, static_cast<int>(network.out[0]), share.group);
        Pack<T> z_j = pack_at(z, j, share.group);
        Pack<T> rho_j = pack_at(rho, j, share.group);
        Pack<T> force;
        for (int i = 0; i < kWidth; ++i) {
          force.lane[i] = g.lane[i] - z_j.lane[i];
          if (k > 0) {
            rho_j.lane[i] =
                math::kick_temper(rho_j.lane[i], force.lane[i], args.step[(k - 1) * dim + j], args.alpha[k - 1]);
          }
        }
        pack_at(tape, plan.point.z + j, share.group) = z_j;
        pack_at(tape, plan.point.rho + j, share.group) = rho_j;
        pack_at(tape, plan.point.force + j, share.group) = force;
        store_lanes(z_j, first, args.samples, dim, j, share.group, args.z_steps + k * rows_of_step);
        store_lanes(rho_j, first, args.samples, dim, j, share.group, args.rho_steps + k * rows_of_step);
        if (k < args.steps) {
          for (int i = 0; i < kWidth; ++i) {
            const math::Drifted<T> next =
                math::kick_drift(z_j.lane[i], rho_j.lane[i], force.lane[i], args.step[k * dim + j]);
            z_j.lane[i] = next.z;
            rho_j.lane[i] = next.rho_half;
          }
          pack_at(z, j, share.group) = z_j;
          pack_at(rho, j, share.group) = rho_j;
        }
      }
      __syncthreads();
    }
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

// gradients [all parameters] of a tile, from its tape and tangents; added to what the task's tiles before it left.
template <typename T>
__device__ void add_parameter_gradients(const SmallNetwork<T>& network, const Plan<T>& plan, const T* tape,
                                        const T* tangents, int64_t points, bool first_tile, T* gradients) {
  constexpr int kEdge = 4;  // entries of a weight's gradient that a thread sums at a time: kEdge x kEdge
  constexpr int kLanes = kSmallFlowLanes<T>;
  constexpr int kWidth = Pack<T>::kWidth;
  const auto put = [&](int64_t place, T sum) { gradients[place] = first_tile ? sum : gradients[place] + sum; };
  for (int l = 0; l < network.depth; ++l) {
    const int rows = static_cast<int>(network.out[l]);
    const int columns = static_cast<int>(network.in[l]);
    const int edges = (columns + kEdge - 1) / kEdge;
    const int64_t h_place = l == 0 ? plan.point.z : plan.point.h[l - 1];
    const int64_t hdot_place = l == 0 ? plan.tangent.u : plan.tangent.hdot[l - 1];
    for (int t = static_cast<int>(threadIdx.x); t < (rows + kEdge - 1) / kEdge * edges; t += kThreads) {
      const int r = t / edges * kEdge;
      const int c = t % edges * kEdge;
      T sum[kEdge][kEdge] = {};
      for (int64_t k = 0; k < points; ++k) {
        const T* const at_point = tape + k * plan.point.numel * kLanes;
        const T* const at_tangent = tangents + k * plan.tangent.numel * kLanes;
        for (int group = 0; group < kGroups<T>; ++group) {
          // Beyond the last row or column its value is read again and its sum thrown away.
          Pack<T> delta_dot[kEdge];
          Pack<T> delta[kEdge];
          for (int i = 0; i < kEdge; ++i) {
            const int row = r + i < rows ? r + i : rows - 1;
            delta_dot[i] = pack_at(at_tangent, plan.tangent.delta_dot[l] + row, group);
            delta[i] = pack_at(at_point, plan.point.delta[l] + row, group);
          }
          for (int j = 0; j < kEdge; ++j) {
            const int column = c + j < columns ? c + j : columns - 1;
            const Pack<T> h = pack_at(at_point, h_place + column, group);
            const Pack<T> hdot = pack_at(at_tangent, hdot_place + column, group);
            for (int i = 0; i < kEdge; ++i) {
              for (int lane = 0; lane < kWidth; ++lane) {
                sum[i][j] += delta_dot[i].lane[lane] * h.lane[lane] + delta[i].lane[lane] * hdot.lane[lane];
              }
            }
          }
        }
      }
      for (int i = 0; i < kEdge; ++i) {
        for (int j = 0; j < kEdge; ++j) {
          if (r + i < rows && c + j < columns) {
            put((r + i) * columns + c + j, sum[i][j]);
          }
        }
      }
    }
    gradients += rows * columns;
    for (int r = static_cast<int>(threadIdx.x); r < rows; r += kThreads) {
      T sum = T(0);
      for (int64_t k = 0; k < points; ++k) {
        for (int group = 0; group < kGroups<T>; ++group) {
          const Pack<T> delta_dot =
              pack_at(tangents + k * plan.tangent.numel * kLanes, plan.tangent.delta_dot[l] + r, group);
          for (int lane = 0; lane < kWidth; ++lane) {
            sum += delta_dot.lane[lane];
          }
        }
      }
      put(r, sum);
    }
    gradients += rows;
  }
}

// What a thread keeps in registers of latent variable j while it walks through the leapfrog equations backwards.
template <typename T>
struct Latent {
  Pack<T> grad_z;
  Pack<T> grad_rho;
  Pack<T> u;
};

// One tile's walk from the last point to the first.
template <typename Head, typename T>
struct BackwardTile {
  static constexpr int kLanes = kSmallFlowLanes<T>;
  static constexpr int kWidth = Pack<T>::kWidth;

  const SmallFlowBackward<T>& args;
  const Plan<T>& plan;
  const Head& head;
  T* shared;
  const T* tape;
  T* tangents;
  int64_t first;
  Share<T> share{};

  __device__ const T* point(int64_t k) const { return tape + k * plan.point.numel * kLanes; }
  __device__ T* tangent(int64_t k) const { return tangents + k * plan.tangent.numel * kLanes; }

  // Through the second half of step k: u gathers what reaches the force at its end.
  __device__ void temper(int64_t k, int j, Latent<T>& latent) const {
    const Pack<T> rho = pack_at(point(k), plan.point.rho + j, share.group);
    const Pack<T> force = pack_at(point(k), plan.point.force + j, share.group);
    const Pack<T> force_next = pack_at(point(k + 1), plan.point.force + j, share.group);
    const T step = args.step[k * args.dim + j];
    Pack<T> momentum;
    Pack<T> step_terms;
    Pack<T> alpha_terms;
    for (int i = 0; i < kWidth; ++i) {
      const T rho_half = math::kick_drift(T(0), rho.lane[i], force.lane[i], step).rho_half;
      const math::TemperCotangent<T> grad =
          math::kick_temper_backward(latent.grad_rho.lane[i], rho_half, force_next.lane[i], step, args.alpha[k]);
      momentum.lane[i] = grad.momentum;
      latent.u.lane[i] += grad.force;
      step_terms.lane[i] = grad.step;
      alpha_terms.lane[i] = grad.alpha;
    }
    pack_at(shared + plan.momentum, j, share.group) = momentum;
    pack_at(shared + plan.step_terms, j, share.group) = step_terms;
    pack_at(shared + plan.alpha_terms, j, share.group) = alpha_terms;
  }

  // Through its first half: u becomes what it leaves for the force at its start.
  __device__ void drift(int64_t k, int j, Latent<T>& latent) const {
    const Pack<T> rho = pack_at(point(k), plan.point.rho + j, share.group);
    const Pack<T> force = pack_at(point(k), plan.point.force + j, share.group);
    const Pack<T> momentum = pack_at(shared + plan.momentum, j, share.group);
    const T step = args.step[k * args.dim + j];
    Pack<T> step_terms = pack_at(shared + plan.step_terms, j, share.group);
    for (int i = 0; i < kWidth; ++i) {
      const math::DriftCotangent<T> grad =
          math::kick_drift_backward(latent.grad_z.lane[i], momentum.lane[i], rho.lane[i], force.lane[i], step);
      latent.grad_rho.lane[i] = grad.rho;
      latent.u.lane[i] = grad.force;
      step_terms.lane[i] += grad.step;
    }
    if (args.step_terms != nullptr) {
      store_lanes(step_terms, first, args.samples, static_cast<int>(args.dim), j, share.group,
                  args.step_terms + k * args.samples * args.dim);
    }
  }

  // Ready for the sweep through point k.
  __device__ void keep(int64_t k, int j, const Latent<T>& latent) const {
    pack_at(shared + plan.grad_z, j, share.group) = latent.grad_z;
    pack_at(shared + plan.rho, j, share.group) = latent.grad_rho;
    pack_at(shared + plan.z, j, share.group) = latent.u;
    pack_at(tangent(k), plan.tangent.u + j, share.group) = latent.u;
  }

  // grad_x = cotangent * d ll/d x at the last point. Leaves buffer[0] in use.
  __device__ void observe(const Pack<T>& cotangent) const {
    const SmallNetwork<T>& network = args.network;
    const int last = network.depth - 1;
    const bool bernoulli = network.likelihood.kind == Likelihood::kBernoulli;
    const T* const at = point(args.steps);
    const int64_t h_place = last == 0 ? plan.point.z : plan.point.h[last - 1];
    if (bernoulli) {
      // d ll/d x = a, which the tape does not keep.
      for (int r = share.first; r < network.in[last]; r += share.kStride) {
        pack_at(shared + plan.buffer[0], r, share.group) = pack_at(at, h_place + r, share.group);
      }
      __syncthreads();
    }
    for (int r = share.first; r < network.out[last]; r += share.kStride) {
      Pack<T> slope;
      if (bernoulli) {
        slope = product_with_bias(shared + plan.weight[last] + r * plan.row[last], shared[plan.bias[last] + r],
                                  shared + plan.buffer[0], static_cast<int>(network.in[last]), share.group);
      } else {
        slope = pack_at(at, plan.point.delta[last] + r, share.group);
      }
      Pack<T> grad_x;
      for (int i = 0; i < kWidth; ++i) {
        grad_x.lane[i] = cotangent.lane[i] * (bernoulli ? slope.lane[i] : -slope.lane[i]);
      }
      pack_at(shared + plan.grad_x, r, share.group) = grad_x;
    }
    __syncthreads();
  }

  // H(u) of point k, up to the first layer: gives where delta_dot of that one lies. cotangent: of ll at this point.
  __device__ const T* sweep(int64_t k, const Pack<T>& cotangent) const {
    const SmallNetwork<T>& network = args.network;
    const int last = network.depth - 1;
    const T* const at = point(k);
    T* const to = tangent(k);
    const T* in = shared + plan.z;
    int turn = 0;
    for (int l = 0; l < last; ++l, turn = 1 - turn) {
      T* const out = shared + plan.buffer[turn];
      for (int r = share.first; r < network.out[l]; r += share.kStride) {
        const Pack<T> s = pack_at(at, plan.point.slope[l] + r, share.group);
        const Pack<T> e = pack_at(at, plan.point.error[l] + r, share.group);
        const Pack<T> adot =
            product(shared + plan.weight[l] + r * plan.row[l], 1, in, static_cast<int>(network.in[l]), share.group);
        Pack<T> hdot;
        Pack<T> curvature;
        with_phi(plan.phi[l], [&](const auto& phi) {
          for (int i = 0; i < kWidth; ++i) {
            curvature.lane[i] = phi.curvature(s.lane[i], e.lane[i]) * adot.lane[i];
            hdot.lane[i] = phi.slope(s.lane[i]) * adot.lane[i];
          }
        });
        pack_at(to, plan.tangent.delta_dot[l] + r, share.group) = curvature;
        pack_at(to, plan.tangent.hdot[l] + r, share.group) = hdot;
        pack_at(out, r, share.group) = hdot;
      }
      __syncthreads();
      in = out;
    }
    T* out = shared + plan.buffer[turn];
    for (int r = share.first; r < network.out[last]; r += share.kStride) {
      const Pack<T> residual = pack_at(at, plan.point.delta[last] + r, share.group);
      const Pack<T> x = pack_at(shared + plan.x, r, share.group);
      const Pack<T> adot = product(shared + plan.weight[last] + r * plan.row[last], 1, in,
                                   static_cast<int>(network.in[last]), share.group);
      Pack<T> grad_x = pack_at(shared + plan.grad_x, r, share.group);
      Pack<T> delta_dot;
      for (int i = 0; i < kWidth; ++i) {
        grad_x.lane[i] += head.cross(x.lane[i]) * adot.lane[i];
        delta_dot.lane[i] =
            head.curvature(residual.lane[i], x.lane[i]) * adot.lane[i] + cotangent.lane[i] * residual.lane[i];
      }
      pack_at(shared + plan.grad_x, r, share.group) = grad_x;
      pack_at(to, plan.tangent.delta_dot[last] + r, share.group) = delta_dot;
      pack_at(out, r, share.group) = delta_dot;
    }
    __syncthreads();
    for (int l = last; l > 0; --l) {
      turn = 1 - turn;
      in = out;
      out = shared + plan.buffer[turn];
      for (int r = share.first; r < network.in[l]; r += share.kStride) {
        const Pack<T> s = pack_at(at, plan.point.slope[l - 1] + r, share.group);
        Pack<T> delta_dot = pack_at(to, plan.tangent.delta_dot[l - 1] + r, share.group);
        const Pack<T> g =
            product(shared + plan.weight[l] + r, plan.row[l], in, static_cast<int>(network.out[l]), share.group);
        const bool bent = !is_piecewise_linear(plan.phi[l - 1].kind);
        with_phi(plan.phi[l - 1], [&](const auto& phi) {
          for (int i = 0; i < kWidth; ++i) {
            const T straight = phi.slope(s.lane[i]) * g.lane[i];
            delta_dot.lane[i] = bent ? straight + delta_dot.lane[i] : straight;
          }
        });
        pack_at(to, plan.tangent.delta_dot[l - 1] + r, share.group) = delta_dot;
        pack_at(out, r, share.group) = delta_dot;
      }
      __syncthreads();
    }
    return out;
  }

  __device__ void run() const {
    const SmallNetwork<T>& network = args.network;
    const int dim = static_cast<int>(args.dim);
    const int outputs = static_cast<int>(network.out[network.depth - 1]);
    const Pack<T> cotangent = load_cotangent(args.grad_log_px, first, args.samples, 1, 0, share.group);
    load_tile(args.x, first, args.samples, outputs, shared + plan.x);
    for (int r = share.first; r < outputs; r += share.kStride) {
      pack_at(shared + plan.grad_x, r, share.group) = Pack<T>{};
    }
    for (int j = share.first; j < dim; j += share.kStride) {
      Latent<T> latent{load_cotangent(args.grad_z_in, first, args.samples, dim, j, share.group),
                       load_cotangent(args.grad_rho_in, first, args.samples, dim, j, share.group),
                       {}};
      temper(args.steps - 1, j, latent);
      keep(args.steps, j, latent);
    }
    __syncthreads();
    if (args.grad_x != nullptr && args.grad_log_px != nullptr) {
      observe(cotangent);
    }
    for (int64_t k = args.steps; k >= 0; --k) {
      if (k > 0 && args.alpha_terms != nullptr && threadIdx.x < kLanes && first + threadIdx.x < args.samples) {
        T sum = T(0);
        for (int j = 0; j < dim; ++j) {
          sum += shared[plan.alpha_terms + j * kLanes + threadIdx.x];
        }
        args.alpha_terms[(k - 1) * args.samples + first + threadIdx.x] = sum;
      }
      const T* const delta_dot = sweep(k, k == args.steps ? cotangent : Pack<T>{});
      for (int j = share.first; j < dim; j += share.kStride) {
        const Pack<T> dz =
            product(shared + plan.weight[0] + j, plan.row[0], delta_dot, static_cast<int>(network.out[0]), share.group);
        Latent<T> latent{pack_at(shared + plan.grad_z, j, share.group), pack_at(shared + plan.rho, j, share.group),
                         pack_at(shared + plan.z, j, share.group)};
        for (int i = 0; i < kWidth; ++i) {
          latent.grad_z.lane[i] += dz.lane[i] - latent.u.lane[i];
        }
        if (k == 0) {
          store_lanes(latent.grad_z, first, args.samples, dim, j, share.group, args.grad_z);
          store_lanes(latent.grad_rho, first, args.samples, dim, j, share.group, args.grad_rho);
          continue;
        }
        drift(k - 1, j, latent);
        if (k > 1) {
          temper(k - 2, j, latent);
        }
        keep(k - 1, j, latent);
      }
      __syncthreads();
    }
    if (args.grad_x != nullptr) {
      for (int r = share.first; r < outputs; r += share.kStride) {
        store_lanes(pack_at(shared + plan.grad_x, r, share.group), first, args.samples, outputs, r, share.group,
                    args.grad_x);
      }
    }
  }
};

template <typename Head, typename T>
__global__ void small_flow_backward_kernel(const __grid_constant__ SmallFlowBackward<T> args,
                                           const __grid_constant__ Plan<T> plan, const Head head) {
  FASTVAE_DYNAMIC_SHARED(T, shared);
  constexpr int64_t kLanes = kSmallFlowLanes<T>;
  const int64_t points = args.steps + 1;
  const int64_t tiles = (args.samples + kLanes - 1) / kLanes;
  int64_t parameters = 0;
  for (int l = 0; l < args.network.depth; ++l) {
    parameters += args.network.out[l] * (args.network.in[l] + 1);
  }
  load_parameters(args.network, plan, shared);
  for (int64_t task = blockIdx.x; task < args.tasks; task += gridDim.x) {
    T* const tangents = args.tangents + task * points * plan.tangent.numel * kLanes;
    const int64_t first_tile = tiles * task / args.tasks;
    for (int64_t tile = first_tile; tile < tiles * (task + 1) / args.tasks; ++tile) {
      const T* const tape = args.tape + tile * points * plan.point.numel * kLanes;
      __syncthreads();  // the parameters are there; the last tile is done
      BackwardTile<Head, T>{args, plan, head, shared, tape, tangents, tile * kLanes}.run();
      if (args.grad_parameters != nullptr) {
        __syncthreads();
        add_parameter_gradients(args.network, plan, tape, tangents, points, tile == first_tile,
                                args.grad_parameters + task * parameters);
      }
    }
  }
}

// --- the sum over tasks ----------------------------------------------------------------------------------------------

// Element i of every tensor is summed by the same thread, so that a tensor which two layers share is safe too.
template <typename T>
__global__ void small_flow_sum_kernel(const __grid_constant__ SmallFlowSum<T> args) {
  int64_t parameters = 0;
  for (int l = 0; l < args.depth; ++l) {
    parameters += args.out[l] * (args.in[l] + 1);
  }
  int64_t offset = 0;
  const auto add = [&](T* gradient, int64_t count) {
    for (int64_t i = global_thread(); gradient != nullptr && i < count; i += global_threads()) {
      T sum = T(0);
      for (int64_t task = 0; task < args.tasks; ++task) {
        sum += args.grad_parameters[task * parameters + offset + i];
      }
      gradient[i] += sum;
    }
    offset += count;
  };
  for (int l = 0; l < args.depth; ++l) {
    add(args.weight[l], args.out[l] * args.in[l]);
    add(args.bias[l], args.out[l]);
  }
}

// --- launches --------------------------------------------------------------------------------------------------------

template <typename T>
void small_flow_launch(const SmallFlow<T>& args, Stream stream) {
  constexpr int64_t kLanes = kSmallFlowLanes<T>;
  const Plan<T> plan = make_plan(args.network, args.dim);
  const Grid grid{(args.samples + kLanes - 1) / kLanes, kThreads, plan.numel * sizeof(T)};
  if (args.network.likelihood.kind == Likelihood::kBernoulli) {
    launch("small_flow", small_flow_kernel<math::BernoulliHead<T>, T>, grid, stream, args, plan,
           math::BernoulliHead<T>(args.network.likelihood));
  } else {
    launch("small_flow", small_flow_kernel<math::GaussianHead<T>, T>, grid, stream, args, plan,
           math::GaussianHead<T>(args.network.likelihood));
  }
}

template <typename T>
void small_flow_backward_launch(const SmallFlowBackward<T>& args, Stream stream) {
  const Plan<T> plan = make_plan(args.network, args.dim);
  const Grid grid{args.tasks, kThreads, plan.numel * sizeof(T)};
  if (args.network.likelihood.kind == Likelihood::kBernoulli) {
    launch("small_flow_backward", small_flow_backward_kernel<math::BernoulliHead<T>, T>, grid, stream, args, plan,
           math::BernoulliHead<T>(args.network.likelihood));
  } else {
    launch("small_flow_backward", small_flow_backward_kernel<math::GaussianHead<T>, T>, grid, stream, args, plan,
           math::GaussianHead<T>(args.network.likelihood));
  }
}

template <typename T>
void small_flow_sum_launch(const SmallFlowSum<T>& args, Stream stream) {
  int64_t largest = 0;
  for (int l = 0; l < args.depth; ++l) {
    largest = std::max(largest, args.out[l] * args.in[l]);
  }
  launch("small_flow_sum", small_flow_sum_kernel<T>, grid_for_elements(largest), stream, args);
}

FASTVAE_DEFINE_CUDA(small_flow, SmallFlow)
FASTVAE_DEFINE_CUDA(small_flow_backward, SmallFlowBackward)
FASTVAE_DEFINE_CUDA(small_flow_sum, SmallFlowSum)

}  // namespace fastvae::cuda
