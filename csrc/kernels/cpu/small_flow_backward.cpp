// The gradient of the Hamiltonian flow through a small multilayer perceptron: every step of a block of samples at
// once, from the last to the first, then the weight gradients over all steps from registers.
//
// Cost a sample: (steps + 1) * 4 passes of 2 * (weights) FLOPs; reads the tape of the forward pass twice.
#include <algorithm>

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
FASTVAE_INLINE void hessian_point(const SmallNetwork<T>& network, const SmallPoint<T>& point,
                                  const SmallTangent<T>& tangent, int64_t dim, const T* x, const T* cotangent,
                                  T* grad_x, T* scratch, T* dz) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  const int last = network.depth - 1;
  const T* in = tangent.u;
  for (int l = 0; l < last; ++l) {
    const int64_t size = network.out[l] * kLanes;
    small_product(network.weight[l], network.in[l], int64_t{1}, static_cast<const T*>(nullptr), in, tangent.hdot[l],
                  network.out[l], network.in[l]);
    activation_tangent(ActivationTangent<T>{tangent.hdot[l], point.slope[l], point.error[l], tangent.hdot[l],
                                            tangent.delta_dot[l], size, network.activation[l]},
                       0, size);
    in = tangent.hdot[l];
  }
  const int64_t outputs = network.out[last];
  small_product(network.weight[last], network.in[last], int64_t{1}, static_cast<const T*>(nullptr), in,
                tangent.delta_dot[last], outputs, network.in[last]);
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
    small_product(network.weight[l], int64_t{1}, network.in[l], static_cast<const T*>(nullptr), tangent.delta_dot[l],
                  scratch, network.in[l], network.out[l]);
    activation_adjoint(ActivationAdjoint<T>{scratch, point.slope[l - 1], tangent.delta_dot[l - 1],
                                            tangent.delta_dot[l - 1], size, network.activation[l - 1]},
                       0, size);
  }
  small_product(network.weight[0], int64_t{1}, network.in[0], static_cast<const T*>(nullptr), tangent.delta_dot[0], dz,
                dim, network.out[0]);
}

// In pairs, so that the additions do not wait for each other.
FASTVAE_INLINE float lane_total(Lanes<float> v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
FASTVAE_INLINE double lane_total(Lanes<double> v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// gradient [rows, columns] += sum over points and lanes of delta_dot (x) h + delta (x) hdot, a tile at a time in
// registers. The four arguments are of the first point; `point` and `tangent` are the distances to the next, in
// vectors.
template <int kTileRows, int kTileColumns, typename T>
FASTVAE_INLINE void outer_tile(const Lanes<T>* delta_dot, const Lanes<T>* h, const Lanes<T>* delta,
                               const Lanes<T>* hdot, int64_t points, int64_t delta_dot_next, int64_t h_next,
                               int64_t delta_next, int64_t hdot_next, T* gradient, int64_t columns) {
  using V = Lanes<T>;
  V sum[kTileRows][kTileColumns];
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < kTileColumns; ++c) {
      sum[r][c] = V{};
    }
  }
  for (int64_t k = 0; k < points; ++k) {
    for (int r = 0; r < kTileRows; ++r) {
      const V left = delta_dot[k * delta_dot_next + r];
      for (int c = 0; c < kTileColumns; ++c) {
        sum[r][c] += left * h[k * h_next + c];
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      const V left = delta[k * delta_next + r];
      for (int c = 0; c < kTileColumns; ++c) {
        sum[r][c] += left * hdot[k * hdot_next + c];
      }
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < kTileColumns; ++c) {
      gradient[r * columns + c] += lane_total(sum[r][c]);
    }
  }
}

template <typename T>
FASTVAE_INLINE void add_parameter_gradients(const SmallNetwork<T>& network, const SmallPoint<T>& point,
                                            int64_t tape_next, const SmallTangent<T>& tangent, int64_t tangents_next,
                                            int64_t points, T* gradients) {
  using V = Lanes<T>;
  constexpr int kLanes = kSmallFlowLanes<T>;
  constexpr int kTile = 4;
  for (int l = 0; l < network.depth; ++l) {
    const V* delta_dot = reinterpret_cast<const V*>(tangent.delta_dot[l]);
    const V* delta = reinterpret_cast<const V*>(point.delta[l]);
    const V* h = reinterpret_cast<const V*>(l == 0 ? point.z : point.h[l - 1]);
    const V* hdot = reinterpret_cast<const V*>(l == 0 ? tangent.u : tangent.hdot[l - 1]);
    const int64_t rows = network.out[l];
    const int64_t columns = network.in[l];
    const int64_t point_next = tape_next / kLanes;
    const int64_t tangent_next = tangents_next / kLanes;
    for (int64_t r = 0; r < rows; r += kTile) {
      for (int64_t c = 0; c < columns; c += kTile) {
        T* corner = gradients + r * columns + c;
        if (r + kTile <= rows && c + kTile <= columns) {
          outer_tile<kTile, kTile, T>(delta_dot + r, h + c, delta + r, hdot + c, points, tangent_next, point_next,
                                      point_next, tangent_next, corner, columns);
          continue;
        }
        for (int64_t i = r; i < std::min(rows, r + kTile); ++i) {
          for (int64_t j = c; j < std::min(columns, c + kTile); ++j) {
            outer_tile<1, 1, T>(delta_dot + i, h + j, delta + i, hdot + j, points, tangent_next, point_next, point_next,
                                tangent_next, gradients + i * columns + j, columns);
          }
        }
      }
    }
    gradients += rows * columns;
    for (int64_t r = 0; r < rows; ++r) {
      V sum{};
      for (int64_t k = 0; k < points; ++k) {
        sum += delta_dot[k * tangent_next + r];
      }
      gradients[r] += lane_total(sum);
    }
    gradients += rows;
  }
}

// grad_x += cotangent * d ll/d x at the last point.
template <typename T>
FASTVAE_INLINE void add_observed_gradient(const SmallNetwork<T>& network, const SmallPoint<T>& point,
                                          const T* cotangent, T* scratch, T* grad_x) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  const int last = network.depth - 1;
  const int64_t outputs = network.out[last];
  const bool bernoulli = network.likelihood.kind == Likelihood::kBernoulli;
  if (bernoulli) {
    // d ll/d x = a, which the tape does not keep.
    small_product(network.weight[last], network.in[last], int64_t{1}, network.bias[last],
                  last == 0 ? point.z : point.h[last - 1], scratch, outputs, network.in[last]);
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
  LaneBuffer<T> x(outputs), grad_x(outputs), scratch(widest), grad_z(dim), grad_rho(dim), momentum(dim), dz(dim);
  LaneBuffer<T> step_terms(dim), tangents(points * tangent_layout.numel);
  T cotangent[kLanes] = {}, alpha_terms[kLanes] = {};
  for (int64_t task = begin; task < end; ++task) {
    for (int64_t block = blocks * task / args.tasks; block < blocks * (task + 1) / args.tasks; ++block) {
      const int64_t first = block * kLanes;
      T* tape = const_cast<T*>(args.tape) + block * points * point_size;
      load_block(args.x, first, args.samples, outputs, x.data());
      load_cotangents(args.grad_z_in, first, args.samples, dim, grad_z.data());
      load_cotangents(args.grad_rho_in, first, args.samples, dim, grad_rho.data());
      load_cotangents(args.grad_log_px, first, args.samples, 1, cotangent);
      std::fill_n(grad_x.data(), outputs * kLanes, T(0));
      T* gx = args.grad_x == nullptr ? nullptr : grad_x.data();

      SmallPoint<T> point = small_point(point_layout, network.depth, tape + args.steps * point_size);
      SmallTangent<T> tangent =
          small_tangent(tangent_layout, network.depth, tangents.data() + args.steps * tangent_size);
      std::fill_n(tangent.u, size, T(0));
      if (gx != nullptr && args.grad_log_px != nullptr) {
        add_observed_gradient(network, point, cotangent, scratch.data(), gx);
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
                  math::kick_temper_backward(grad_rho.data()[i], rho_half, point.force[i], step, alpha);
              momentum.data()[i] = grad.momentum;
              tangent.u[i] += grad.force;
              step_terms.data()[i] = grad.step;
              alpha_terms[lane] += grad.alpha;
            }
          }
        }
        hessian_point(network, point, tangent, dim, x.data(), k == args.steps ? cotangent : nullptr, gx, scratch.data(),
                      dz.data());
        for (int64_t i = 0; i < size; ++i) {
          grad_z.data()[i] += dz.data()[i] - tangent.u[i];
        }
        if (k == 0) {
          break;
        }
        tangent = small_tangent(tangent_layout, network.depth, tangents.data() + (k - 1) * tangent_size);
        for (int64_t j = 0; j < dim; ++j) {
          const T step = args.step[(k - 1) * dim + j];
          for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t i = j * kLanes + lane;
            const math::DriftCotangent<T> grad =
                math::kick_drift_backward(grad_z.data()[i], momentum.data()[i], start.rho[i], start.force[i], step);
            grad_rho.data()[i] = grad.rho;
            tangent.u[i] = grad.force;
            step_terms.data()[i] += grad.step;
          }
        }
        if (args.step_terms != nullptr) {
          store_block(step_terms.data(), first, args.samples, dim, args.step_terms + (k - 1) * args.samples * dim);
        }
        if (args.alpha_terms != nullptr) {
          store_block(alpha_terms, first, args.samples, 1, args.alpha_terms + (k - 1) * args.samples);
        }
        point = start;
      }
      store_block(grad_z.data(), first, args.samples, dim, args.grad_z);
      store_block(grad_rho.data(), first, args.samples, dim, args.grad_rho);
      if (gx != nullptr) {
        store_block(gx, first, args.samples, outputs, args.grad_x);
      }
      if (args.grad_parameters != nullptr) {
        add_parameter_gradients(network, point, point_size, tangent, tangent_size, points,
                                args.grad_parameters + task * small_flow_parameter_numel(network));
      }
    }
  }
}

FASTVAE_DEFINE_CPU(small_flow_backward, SmallFlowBackward)

}  // namespace fastvae::cpu
