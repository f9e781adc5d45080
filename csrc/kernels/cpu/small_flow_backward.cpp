// The gradient of the Hamiltonian flow through a small multilayer perceptron: every step of a block of samples at
// once, from the last to the first, then the weight gradients over all steps.
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
  constexpr int kBlock = kSmallFlowLanes<T>;
  SmallTangent<T> tangent{};
  tangent.u = place + at.u * kBlock;
  for (int l = 0; l < depth; ++l) {
    tangent.delta_dot[l] = place + at.delta_dot[l] * kBlock;
    tangent.hdot[l] = place + at.hdot[l] * kBlock;
  }
  return tangent;
}

// dz [samples, dim] = H(u) at one point; cotangent [samples] of ll or null; adds to grad_x [samples, outputs] or null.
// scratch: room for [samples, widest layer].
template <typename T>
FASTVAE_INLINE void hessian_point(const SmallNetwork<T>& network, const SmallWeights<T>& weights,
                                  const SmallPoint<T>& point, const SmallTangent<T>& tangent, int64_t samples,
                                  const T* x, const T* cotangent, T* grad_x, T* scratch, T* dz) {
  const int last = network.depth - 1;
  const T* in = tangent.u;
  for (int l = 0; l < last; ++l) {
    const int64_t size = samples * network.out[l];
    weights.forward(network, l, in, samples, tangent.hdot[l]);
    activation_tangent(ActivationTangent<T>{tangent.hdot[l], point.slope[l], point.error[l], tangent.hdot[l],
                                            tangent.delta_dot[l], size, network.activation[l]},
                       0, size);
    in = tangent.hdot[l];
  }
  T* output = tangent.delta_dot[last];
  weights.forward(network, last, in, samples, output);
  head_tangent(HeadTangent<T>{output, point.delta[last], x, cotangent, output, grad_x, samples, 1, network.out[last],
                              network.likelihood},
               0, samples);
  for (int l = last; l > 0; --l) {
    const int64_t size = samples * network.in[l];
    weights.reverse(network, l, tangent.delta_dot[l], samples, scratch);
    activation_adjoint(ActivationAdjoint<T>{scratch, point.slope[l - 1], tangent.delta_dot[l - 1],
                                            tangent.delta_dot[l - 1], size, network.activation[l - 1]},
                       0, size);
  }
  weights.reverse(network, 0, tangent.delta_dot[0], samples, dz);
}

// Matrices [samples, features] of consecutive points.
template <typename T>
struct PointRows {
  const T* first;
  int64_t next;  // from a point's matrix to the next one's
};

// weight [rows, columns] += the sum over points and samples of left (x) right.
template <typename T>
FASTVAE_INLINE void add_outer_products(PointRows<T> left, PointRows<T> right, int64_t points, int64_t samples,
                                       int64_t rows, int64_t columns, T* weight) {
  strided_product(StridedProduct<T>{left.first, 1, rows, left.next, right.first, columns, right.next, weight, columns,
                                    rows, columns, samples, points, true});
}

// gradients += sum over points and samples of delta_dot (x) h + delta (x) hdot, and of delta_dot for the bias.
template <typename T>
FASTVAE_INLINE void add_parameter_gradients(const SmallNetwork<T>& network, const SmallPoint<T>& point,
                                            int64_t tape_next, const SmallTangent<T>& tangent, int64_t tangents_next,
                                            int64_t points, int64_t samples, T* gradients) {
  for (int l = 0; l < network.depth; ++l) {
    const int64_t rows = network.out[l], columns = network.in[l];
    const PointRows<T> h{l == 0 ? point.z : point.h[l - 1], tape_next};
    const PointRows<T> hdot{l == 0 ? tangent.u : tangent.hdot[l - 1], tangents_next};
    const PointRows<T> delta{point.delta[l], tape_next};
    const PointRows<T> delta_dot{tangent.delta_dot[l], tangents_next};
    add_outer_products(delta_dot, h, points, samples, rows, columns, gradients);
    add_outer_products(delta, hdot, points, samples, rows, columns, gradients);
    T* bias = gradients + rows * columns;
    for (int64_t k = 0; k < points; ++k) {
      const T* from = delta_dot.first + k * delta_dot.next;
      for (int64_t sample = 0; sample < samples; ++sample, from += rows) {
#pragma GCC ivdep
        for (int64_t r = 0; r < rows; ++r) {
          bias[r] += from[r];
        }
      }
    }
    gradients = bias + rows;
  }
}

// grad_x += cotangent * d ll/d x at the last point.
template <typename T>
FASTVAE_INLINE void add_observed_gradient(const SmallNetwork<T>& network, const SmallWeights<T>& weights,
                                          const SmallPoint<T>& point, int64_t samples, const T* cotangent, T* scratch,
                                          T* grad_x) {
  const int last = network.depth - 1;
  const int64_t outputs = network.out[last];
  const bool bernoulli = network.likelihood.kind == Likelihood::kBernoulli;
  if (bernoulli) {
    // d ll/d x = a, which the tape does not keep.
    weights.forward(network, last, last == 0 ? point.z : point.h[last - 1], samples, scratch);
  }
  for (int64_t sample = 0; sample < samples; ++sample) {
    for (int64_t j = 0; j < outputs; ++j) {
      const int64_t i = sample * outputs + j;
      const T bias = network.bias[last] == nullptr ? T(0) : network.bias[last][j];
      grad_x[i] += cotangent[sample] * (bernoulli ? scratch[i] + bias : -point.delta[last][i]);
    }
  }
}

template <typename T>
FASTVAE_INLINE void copy_or_zero(const T* from, int64_t count, T* to) {
  if (from == nullptr) {
    std::fill_n(to, count, T(0));
  } else {
    std::copy_n(from, count, to);
  }
}

template <typename T>
FASTVAE_INLINE void small_flow_backward_template(const SmallFlowBackward<T>& args, int64_t begin, int64_t end) {
  constexpr int kBlock = kSmallFlowLanes<T>;
  const SmallNetwork<T>& network = args.network;
  const int64_t dim = args.dim;
  const int64_t outputs = network.out[network.depth - 1];
  const int64_t points = args.steps + 1;
  const SmallPointLayout point_layout = small_point_layout(network, dim);
  const SmallTangentLayout tangent_layout = small_tangent_layout(network, dim);
  const int64_t point_size = point_layout.numel * kBlock;
  const int64_t tangent_size = tangent_layout.numel * kBlock;
  const int64_t blocks = (args.samples + kBlock - 1) / kBlock;
  struct Memory {
    Memory(Carver carver, const SmallNetwork<T>& network, int64_t dim, int64_t tangents_size)
        : weights(network, carver) {
      const int64_t widest = std::max(*std::max_element(network.out, network.out + network.depth),
                                      *std::max_element(network.in, network.in + network.depth));
      scratch = carver.take<T>(widest * kBlock);
      momentum = carver.take<T>(dim * kBlock);
      dz = carver.take<T>(dim * kBlock);
      step_terms = carver.take<T>(dim * kBlock);
      tangents = carver.take<T>(tangents_size);
      bytes = carver.used();
    }
    SmallWeights<T> weights;
    T *scratch, *momentum, *dz, *step_terms, *tangents;
    int64_t bytes;
  };
  Scratch scratch(Memory(Carver(nullptr), network, dim, points * tangent_size).bytes);
  Memory memory(Carver(scratch.data()), network, dim, points * tangent_size);
  memory.weights.fill(network);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t numel = small_flow_parameter_numel(network);
    T* gradients = args.grad_parameters == nullptr ? nullptr : args.grad_parameters + task * numel;
    if (gradients != nullptr) {
      std::fill_n(gradients, numel, T(0));
    }
    for (int64_t block = blocks * task / args.tasks; block < blocks * (task + 1) / args.tasks; ++block) {
      const int64_t first = block * kBlock;
      const int64_t samples = std::min<int64_t>(kBlock, args.samples - first);
      const int64_t size = samples * dim;
      T* tape = const_cast<T*>(args.tape) + block * points * point_size;
      const T* x = args.x + first * outputs;
      const auto rows_of = [&](const T* all)
                               FASTVAE_LAMBDA_INLINE { return all == nullptr ? nullptr : all + first * dim; };
      T* grad_z = args.grad_z + first * dim;
      T* grad_rho = args.grad_rho + first * dim;
      copy_or_zero(rows_of(args.grad_z_in), size, grad_z);
      copy_or_zero(rows_of(args.grad_rho_in), size, grad_rho);
      const T* cotangent = args.grad_log_px == nullptr ? nullptr : args.grad_log_px + first;
      T* grad_x = args.grad_x == nullptr ? nullptr : args.grad_x + first * outputs;

      SmallPoint<T> point = small_point(point_layout, network.depth, tape + args.steps * point_size);
      SmallTangent<T> tangent =
          small_tangent(tangent_layout, network.depth, memory.tangents + args.steps * tangent_size);
      std::fill_n(tangent.u, size, T(0));
      if (grad_x != nullptr) {
        std::fill_n(grad_x, samples * outputs, T(0));
        if (cotangent != nullptr) {
          add_observed_gradient(network, memory.weights, point, samples, cotangent, memory.scratch, grad_x);
        }
      }
      for (int64_t k = args.steps; k >= 0; --k) {
        // tangent.u holds what step k left for the force at z_k; step k - 1 adds its second half kick.
        const T* step = k == 0 ? nullptr : args.step + (k - 1) * dim;
        const SmallPoint<T> start =
            k == 0 ? point : small_point(point_layout, network.depth, tape + (k - 1) * point_size);
        T* step_terms = k == 0 || args.step_terms == nullptr ? memory.step_terms
                                                             : args.step_terms + ((k - 1) * args.samples + first) * dim;
        for (int64_t sample = 0; k > 0 && sample < samples; ++sample) {
          T alpha_term = T(0);
          for (int64_t j = 0; j < dim; ++j) {
            const int64_t i = sample * dim + j;
            const T rho_half = math::kick_drift(T(0), start.rho[i], start.force[i], step[j]).rho_half;
            const math::TemperCotangent<T> grad =
                math::kick_temper_backward(grad_rho[i], rho_half, point.force[i], step[j], args.alpha[k - 1]);
            memory.momentum[i] = grad.momentum;
            tangent.u[i] += grad.force;
            step_terms[i] = grad.step;
            alpha_term += grad.alpha;
          }
          if (args.alpha_terms != nullptr) {
            args.alpha_terms[(k - 1) * args.samples + first + sample] = alpha_term;
          }
        }
        hessian_point(network, memory.weights, point, tangent, samples, x, k == args.steps ? cotangent : nullptr,
                      grad_x, memory.scratch, memory.dz);
        for (int64_t i = 0; i < size; ++i) {
          grad_z[i] += memory.dz[i] - tangent.u[i];
        }
        if (k == 0) {
          break;
        }
        tangent = small_tangent(tangent_layout, network.depth, memory.tangents + (k - 1) * tangent_size);
        for (int64_t i = 0; i < size; i += dim) {
          for (int64_t j = 0; j < dim; ++j) {
            const math::DriftCotangent<T> grad = math::kick_drift_backward(
                grad_z[i + j], memory.momentum[i + j], start.rho[i + j], start.force[i + j], step[j]);
            grad_rho[i + j] = grad.rho;
            tangent.u[i + j] = grad.force;
            step_terms[i + j] += grad.step;
          }
        }
        point = start;
      }
      if (gradients != nullptr) {
        add_parameter_gradients(network, point, point_size, tangent, tangent_size, points, samples, gradients);
      }
    }
  }
}

FASTVAE_DEFINE_CPU(small_flow_backward, SmallFlowBackward)

}  // namespace fastvae::cpu
