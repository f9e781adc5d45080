// The Hamiltonian flow through a small multilayer perceptron on a GPU: the whole trajectory in one launch each way
// (small_flow_backward.cu; the twins are cpu/small_flow.cpp and cpu/small_flow_backward.cpp).
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
#include "small_flow.cuh"

namespace fastvae::cuda {

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

template <typename T>
void small_flow_launch(const SmallFlow<T>& args, Stream stream) {
  constexpr int64_t kLanes = kSmallFlowLanes<T>;
  const Plan<T> plan = make_plan(args.network, args.dim);
  const Grid grid{(args.samples + kLanes - 1) / kLanes, kThreads, plan.numel * sizeof(T)};
  switch (args.network.likelihood.kind) {
#define FASTVAE_CASE(kind, Head)                                                                                     \
  case Likelihood::kind:                                                                                             \
    launch("small_flow", small_flow_kernel<Head<T>, T>, grid, stream, args, plan, Head<T>(args.network.likelihood)); \
    break;
    FASTVAE_INDEPENDENT_HEADS(FASTVAE_CASE)
#undef FASTVAE_CASE
    case Likelihood::kCategorical:  // runs layer by layer (takes_small_flow)
      break;
  }
}

FASTVAE_DEFINE_CUDA(small_flow, SmallFlow)

}  // namespace fastvae::cuda
