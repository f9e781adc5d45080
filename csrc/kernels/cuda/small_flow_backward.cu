// The gradient of the Hamiltonian flow through a small multilayer perceptron on a GPU, in one launch, and a small one
// that sums the tasks' parts of the parameters' gradients in their order.
//
// Cost a sample: (steps + 1) * 4 passes of 2 * (weights) FLOPs; the tape is read twice, the tangents are written and
// read once, the weights are read once a block. How a block works: small_flow.cu.
#include "small_flow.cuh"

namespace fastvae::cuda {

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
        grad_x.lane[i] += head.cross(residual.lane[i], x.lane[i]) * adot.lane[i];
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

template <typename T>
void small_flow_backward_launch(const SmallFlowBackward<T>& args, Stream stream) {
  const Plan<T> plan = make_plan(args.network, args.dim);
  const Grid grid{args.tasks, kThreads, plan.numel * sizeof(T)};
  switch (args.network.likelihood.kind) {
#define FASTVAE_CASE(kind, Head)                                                                    \
  case Likelihood::kind:                                                                            \
    launch("small_flow_backward", small_flow_backward_kernel<Head<T>, T>, grid, stream, args, plan, \
           Head<T>(args.network.likelihood));                                                       \
    break;
    FASTVAE_INDEPENDENT_HEADS(FASTVAE_CASE)
#undef FASTVAE_CASE
    case Likelihood::kCategorical:  // runs layer by layer (takes_small_flow)
      break;
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

FASTVAE_DEFINE_CUDA(small_flow_backward, SmallFlowBackward)
FASTVAE_DEFINE_CUDA(small_flow_sum, SmallFlowSum)

}  // namespace fastvae::cuda
