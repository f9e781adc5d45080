// The gradient of the Hamiltonian flow through a small multilayer perceptron: every step of a block of samples at
// once, from the last to the first, then the weight gradients over all steps from registers.
//
// Cost a sample: (steps + 1) * 4 passes of 2 * (weights) FLOPs; reads the tape of the forward pass twice.
#include <algorithm>
#include <cstring>
#include <utility>

#include "../math/leapfrog.h"
#include "small_flow.h"

namespace fastvae::cpu {

// SmallTangentLayout as pointers.
template <typename T>
struct SmallTangent {
  T* u;
  T* hdot[kSmallFlowDepth];
  T* delta_dot[kSmallFlowDepth];
};

template <typename T>
FASTVAE_INLINE SmallTangent<T> small_tangent(const SmallTangentLayout& at, int depth, T* place) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  SmallTangent<T> tangent{};
  tangent.u = place + at.u * kLanes;
  for (int l = 0; l < depth; ++l) {
    tangent.delta_dot[l] = place + at.delta_dot[l] * kLanes;
    tangent.hdot[l] = place + at.hdot[l] * kLanes;
  }
  return tangent;
}

// dz = H(u) of one point; cotangent [lanes] of ll or null; adds to grad_x [outputs, lanes] or null.
template <typename T>
FASTVAE_INLINE void hessian_point(const SmallNetwork<T>& network, const PackedWeights<T>& weights,
                                  const SmallPoint<T>& point, const SmallTangent<T>& tangent, int64_t dim, const T* x,
                                  const T* cotangent, T* grad_x, T* scratch, T* dz) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  const int last = network.depth - 1;
  const T* in = tangent.u;
  for (int l = 0; l < last; ++l) {
    const int64_t size = network.out[l] * kLanes;
    small_product<false>(weights.forward[l], in, tangent.hdot[l], network.out[l], network.in[l]);
    activation_tangent(ActivationTangent<T>{tangent.hdot[l], point.slope[l], point.error[l], tangent.hdot[l],
                                            tangent.delta_dot[l], size, network.activation[l]},
                       0, size);
    in = tangent.hdot[l];
  }
  const int64_t outputs = network.out[last];
  small_product<false>(weights.forward[last], in, tangent.delta_dot[last], outputs, network.in[last]);
  head_tangent(HeadTangent<T>{tangent.delta_dot[last], point.delta[last], x, nullptr, tangent.delta_dot[last], grad_x,
                              1, 1, outputs * kLanes, network.likelihood},
               0, 1);
  if (cotangent != nullptr) {
    for (int64_t j = 0; j < outputs; ++j) {
      for (int lane = 0; lane < kLanes; ++lane) {
        tangent.delta_dot[last][j * kLanes + lane] += cotangent[lane] * point.delta[last][j * kLanes + lane];
      }
    }
  }
  for (int l = last; l > 0; --l) {
    const int64_t size = network.in[l] * kLanes;
    small_product<false>(weights.reverse[l], tangent.delta_dot[l], scratch, network.in[l], network.out[l]);
    activation_adjoint(ActivationAdjoint<T>{scratch, point.slope[l - 1], tangent.delta_dot[l - 1],
                                            tangent.delta_dot[l - 1], size, network.activation[l - 1]},
                       0, size);
  }
  small_product<false>(weights.reverse[0], tangent.delta_dot[0], dz, dim, network.out[0]);
}

// The even and the odd lanes of a and b, added: [a0 + a1, a2 + a3, .., b0 + b1, ..].
template <typename V, int... kLane>
FASTVAE_INLINE V add_pairs(V a, V b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane)...) + __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}

// totals[i] = the sum over the lanes of values[i]. Halving all of them together takes about two shuffles and an
// addition a value; one by one it would take that for each halving. Recursive, so that arrays become registers.
template <int kWidth, int kCount, typename T>
FASTVAE_INLINE void lane_totals(const Lanes<T> (&values)[kCount], T* totals) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  if constexpr (kWidth > 1) {
    Lanes<T> pairs[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) {
      pairs[i] = add_pairs(values[2 * i], values[2 * i + 1], std::make_integer_sequence<int, kLanes>());
    }
    lane_totals<kWidth / 2, kCount / 2, T>(pairs, totals);
  } else {
    for (int i = 0; i < kCount; ++i) {
      std::memcpy(totals + i * kLanes, &values[i], sizeof(values[i]));
    }
  }
}

template <typename T>
FASTVAE_INLINE T lane_total(Lanes<T> value) {
  T total = T(0);
  for (int lane = 0; lane < kSmallFlowLanes<T>; ++lane) {
    total += value[lane];
  }
  return total;
}

constexpr int kTile = 4;  // features a side of the tiles of weight gradients

// The features of consecutive points: those of the first, and the distance to the next point's, in vectors.
template <typename V>
struct PointRows {
  const V* first;
  int64_t next;
};

// out [tiles, 2 * points, kTile] = the features of `one`, then of `other`; zeros beyond the last feature. In the order
// in which the products read them: points lie far apart, each on its own pages.
template <typename V>
FASTVAE_INLINE void pack_tiles(PointRows<V> one, PointRows<V> other, int64_t points, int64_t features, V* out) {
  for (int64_t k = 0; k < 2 * points; ++k) {
    const V* from = k < points ? one.first + k * one.next : other.first + (k - points) * other.next;
    for (int64_t f = 0; f < features; f += kTile) {
      V* to = out + (f * 2 * points + k * kTile);
      for (int i = 0; i < kTile; ++i) {
        to[i] = f + i < features ? from[f + i] : V{};
      }
    }
  }
}

// totals [kTile, kTile] = sum over `inner` vectors and their lanes of left (x) right, from registers.
template <typename T>
FASTVAE_INLINE void outer_tile(const Lanes<T>* left, const Lanes<T>* right, int64_t inner, T* totals) {
  using V = Lanes<T>;
  V sum[kTile * kTile];
  for (V& value : sum) {
    value = V{};
  }
  for (int64_t k = 0; k < inner; ++k, left += kTile, right += kTile) {
    for (int r = 0; r < kTile; ++r) {
      for (int c = 0; c < kTile; ++c) {
        sum[r * kTile + c] += left[r] * right[c];
      }
    }
  }
  lane_totals<kSmallFlowLanes<T>, kTile * kTile, T>(sum, totals);
}

// gradient of a layer += sum over points and lanes of delta_dot (x) h + delta (x) hdot, and of delta_dot for the bias.
// packed: room for (rows + columns, each rounded up to kTile) * 2 * points vectors.
template <typename T>
FASTVAE_INLINE void add_layer_gradients(PointRows<Lanes<T>> delta_dot, PointRows<Lanes<T>> delta, PointRows<Lanes<T>> h,
                                        PointRows<Lanes<T>> hdot, int64_t points, int64_t rows, int64_t columns,
                                        Lanes<T>* packed, T* weight, T* bias) {
  using V = Lanes<T>;
  const int64_t inner = 2 * points;
  V* left = packed;
  V* right = packed + (rows + kTile - 1) / kTile * kTile * inner;
  pack_tiles(delta_dot, delta, points, rows, left);
  pack_tiles(h, hdot, points, columns, right);
  for (int64_t r = 0; r < rows; r += kTile) {
    const int64_t tall = std::min<int64_t>(kTile, rows - r);
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t wide = std::min<int64_t>(kTile, columns - c);
      T totals[kTile * kTile];
      outer_tile(left + r * inner, right + c * inner, inner, totals);
      for (int64_t i = 0; i < tall; ++i) {
        for (int64_t j = 0; j < wide; ++j) {
          weight[(r + i) * columns + c + j] += totals[i * kTile + j];
        }
      }
    }
    for (int64_t i = 0; i < tall; ++i) {
      V sum{};
      for (int64_t k = 0; k < points; ++k) {
        sum += left[r * inner + k * kTile + i];
      }
      bias[r + i] += lane_total<T>(sum);
    }
  }
}

template <typename T>
FASTVAE_INLINE void add_parameter_gradients(const SmallNetwork<T>& network, const SmallPoint<T>& point,
                                            int64_t tape_next, const SmallTangent<T>& tangent, int64_t tangents_next,
                                            int64_t points, T* packed, T* gradients) {
  using V = Lanes<T>;
  constexpr int kLanes = kSmallFlowLanes<T>;
  const auto rows_of = [](const T* first, int64_t next) FASTVAE_LAMBDA_INLINE {
    return PointRows<V>{reinterpret_cast<const V*>(first), next / kLanes};
  };
  for (int l = 0; l < network.depth; ++l) {
    const int64_t numel = network.out[l] * network.in[l];
    add_layer_gradients(rows_of(tangent.delta_dot[l], tangents_next), rows_of(point.delta[l], tape_next),
                        rows_of(l == 0 ? point.z : point.h[l - 1], tape_next),
                        rows_of(l == 0 ? tangent.u : tangent.hdot[l - 1], tangents_next), points, network.out[l],
                        network.in[l], reinterpret_cast<V*>(packed), gradients, gradients + numel);
    gradients += numel + network.out[l];
  }
}

// grad_x += cotangent * d ll/d x at the last point.
template <typename T>
FASTVAE_INLINE void add_observed_gradient(const SmallNetwork<T>& network, const PackedWeights<T>& weights,
                                          const SmallPoint<T>& point, const T* cotangent, T* scratch, T* grad_x) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  const int last = network.depth - 1;
  const int64_t outputs = network.out[last];
  const bool bernoulli = network.likelihood.kind == Likelihood::kBernoulli;
  if (bernoulli) {
    // d ll/d x = a, which the tape does not keep.
    small_product<true>(weights.forward[last], last == 0 ? point.z : point.h[last - 1], scratch, outputs,
                        network.in[last]);
  }
  for (int64_t j = 0; j < outputs; ++j) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t i = j * kLanes + lane;
      grad_x[i] += cotangent[lane] * (bernoulli ? scratch[i] : -point.delta[last][i]);
    }
  }
}

template <typename T>
FASTVAE_INLINE void small_flow_backward_template(const SmallFlowBackward<T>& args, int64_t begin, int64_t end) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  const SmallNetwork<T>& network = args.network;
  const int64_t dim = args.dim;
  const int64_t size = dim * kLanes;
  const int64_t outputs = network.out[network.depth - 1];
  const int64_t points = args.steps + 1;
  const SmallPointLayout point_layout = small_point_layout(network, dim);
  const SmallTangentLayout tangent_layout = small_tangent_layout(network, dim);
  const int64_t point_size = point_layout.numel * kLanes;
  const int64_t tangent_size = tangent_layout.numel * kLanes;
  const int64_t blocks = (args.samples + kLanes - 1) / kLanes;
  const int64_t widest = std::max(*std::max_element(network.out, network.out + network.depth),
                                  *std::max_element(network.in, network.in + network.depth));
  const int64_t tangents_size = points * tangent_size;
  struct Memory {
    Memory(Carver carver, const SmallFlowBackward<T>& args, int64_t outputs, int64_t widest, int64_t tangents_size)
        : weights(args.network, carver) {
      const auto lanes_of = [&](int64_t features) { return carver.take<T>(features * kLanes); };
      x = lanes_of(outputs);
      grad_x = lanes_of(outputs);
      scratch = lanes_of(widest);
      grad_z = lanes_of(args.dim);
      grad_rho = lanes_of(args.dim);
      momentum = lanes_of(args.dim);
      dz = lanes_of(args.dim);
      step_terms = lanes_of(args.dim);
      tangents = carver.take<T>(tangents_size);
      packed = args.grad_parameters == nullptr ? nullptr : lanes_of(2 * (args.steps + 1) * 2 * (widest + kTile - 1));
      bytes = carver.used();
    }
    PackedWeights<T> weights;
    T *x, *grad_x, *scratch, *grad_z, *grad_rho, *momentum, *dz, *step_terms, *tangents, *packed;
    int64_t bytes;
  };
  Scratch scratch(Memory(Carver(nullptr), args, outputs, widest, tangents_size).bytes);
  Memory memory(Carver(scratch.data()), args, outputs, widest, tangents_size);
  memory.weights.fill(network);
  T cotangent[kLanes] = {}, alpha_terms[kLanes] = {};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t numel = small_flow_parameter_numel(network);
    T* gradients = args.grad_parameters == nullptr ? nullptr : args.grad_parameters + task * numel;
    if (gradients != nullptr) {
      std::fill_n(gradients, numel, T(0));
    }
    for (int64_t block = blocks * task / args.tasks; block < blocks * (task + 1) / args.tasks; ++block) {
      const int64_t first = block * kLanes;
      T* tape = const_cast<T*>(args.tape) + block * points * point_size;
      load_block(args.x, first, args.samples, outputs, memory.x);
      load_cotangents(args.grad_z_in, first, args.samples, dim, memory.grad_z);
      load_cotangents(args.grad_rho_in, first, args.samples, dim, memory.grad_rho);
      load_cotangents(args.grad_log_px, first, args.samples, 1, cotangent);
      std::fill_n(memory.grad_x, outputs * kLanes, T(0));
      T* gx = args.grad_x == nullptr ? nullptr : memory.grad_x;

      SmallPoint<T> point = small_point(point_layout, network.depth, tape + args.steps * point_size);
      SmallTangent<T> tangent =
          small_tangent(tangent_layout, network.depth, memory.tangents + args.steps * tangent_size);
      std::fill_n(tangent.u, size, T(0));
      if (gx != nullptr && args.grad_log_px != nullptr) {
        add_observed_gradient(network, memory.weights, point, cotangent, memory.scratch, gx);
      }
      for (int64_t k = args.steps; k >= 0; --k) {
        // tangent.u holds what step k left for the force at z_k; step k - 1 adds its second half kick.
        const SmallPoint<T> start =
            k == 0 ? point : small_point(point_layout, network.depth, tape + (k - 1) * point_size);
        if (k > 0) {
          const T alpha = args.alpha[k - 1];
          std::fill_n(alpha_terms, kLanes, T(0));
          for (int64_t j = 0; j < dim; ++j) {
            const T step = args.step[(k - 1) * dim + j];
            for (int lane = 0; lane < kLanes; ++lane) {
              const int64_t i = j * kLanes + lane;
              const T rho_half = math::kick_drift(T(0), start.rho[i], start.force[i], step).rho_half;
              const math::TemperCotangent<T> grad =
                  math::kick_temper_backward(memory.grad_rho[i], rho_half, point.force[i], step, alpha);
              memory.momentum[i] = grad.momentum;
              tangent.u[i] += grad.force;
              memory.step_terms[i] = grad.step;
              alpha_terms[lane] += grad.alpha;
            }
          }
        }
        hessian_point(network, memory.weights, point, tangent, dim, memory.x, k == args.steps ? cotangent : nullptr, gx,
                      memory.scratch, memory.dz);
        for (int64_t i = 0; i < size; ++i) {
          memory.grad_z[i] += memory.dz[i] - tangent.u[i];
        }
        if (k == 0) {
          break;
        }
        tangent = small_tangent(tangent_layout, network.depth, memory.tangents + (k - 1) * tangent_size);
        for (int64_t j = 0; j < dim; ++j) {
          const T step = args.step[(k - 1) * dim + j];
          for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t i = j * kLanes + lane;
            const math::DriftCotangent<T> grad =
                math::kick_drift_backward(memory.grad_z[i], memory.momentum[i], start.rho[i], start.force[i], step);
            memory.grad_rho[i] = grad.rho;
            tangent.u[i] = grad.force;
            memory.step_terms[i] += grad.step;
          }
        }
        if (args.step_terms != nullptr) {
          store_block(memory.step_terms, first, args.samples, dim, args.step_terms + (k - 1) * args.samples * dim);
        }
        if (args.alpha_terms != nullptr) {
          store_block(alpha_terms, first, args.samples, 1, args.alpha_terms + (k - 1) * args.samples);
        }
        point = start;
      }
      store_block(memory.grad_z, first, args.samples, dim, args.grad_z);
      store_block(memory.grad_rho, first, args.samples, dim, args.grad_rho);
      if (gx != nullptr) {
        store_block(gx, first, args.samples, outputs, args.grad_x);
      }
      if (gradients != nullptr) {
        add_parameter_gradients(network, point, point_size, tangent, tangent_size, points, memory.packed, gradients);
      }
    }
  }
}

FASTVAE_DEFINE_CPU(small_flow_backward, SmallFlowBackward)

}  // namespace fastvae::cpu
