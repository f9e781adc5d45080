// The mixture of posteriors and its gradient on a GPU (aggregate_posterior.h gives formulas and costs;
// cpu/aggregate_posterior.cpp is the twin). One warp a code, or a component in the gradient to them; its lanes are the
// coordinates. In the gradients a lane keeps kEach of them in registers, and the walk over the others is repeated for
// what is beyond kEach * kWarp.
#include "../aggregate_posterior.h"

#include "launch.cuh"

namespace fastvae::cuda {

constexpr int kEach = 4;

// Calls body(row) in every lane of the warp that has it.
template <typename Body>
__device__ void for_each_row_of_warp(int64_t rows, const Body& body) {
  for (int64_t row = global_thread() / kWarp; row < rows; row += global_threads() / kWarp) {
    body(row);
  }
}

template <typename Args>
__device__ auto term_of(const Args& args, int64_t code, int64_t component, int64_t j) {
  const int64_t at = component * args.dim + j;
  return math::ComponentTerm(args.z[code * args.dim + j], args.mu[at], args.logvar[at], args.precision[at]);
}

// sum_j l_mnj, in every lane.
template <typename T, typename Args>
__device__ T whole_density(const Args& args, int64_t code, int64_t component) {
  T sum = T(0);
  for (int64_t j = threadIdx.x % kWarp; j < args.dim; j += kWarp) {
    sum += term_of(args, code, component, j).log_density;
  }
  return warp_sum(sum);
}

template <typename T>
__global__ void aggregate_posterior_kernel(const AggregatePosterior<T> args) {
  for_each_row_of_warp(args.codes, [&](int64_t code) {
    T largest = -math::Ieee<T>::kInfinity, sum = T(0);
    for (int64_t n = 0; n < args.components; ++n) {
      math::add_to_log_sum(whole_density<T>(args, code, n), largest, sum);
    }
    if (threadIdx.x % kWarp == 0) {
      args.log_q[code] = largest + (math::log(sum) - args.log_components);
    }
    for (int64_t j = threadIdx.x % kWarp; j < args.dim; j += kWarp) {
      largest = -math::Ieee<T>::kInfinity;
      sum = T(0);
      for (int64_t n = 0; n < args.components; ++n) {
        math::add_to_log_sum(term_of(args, code, n, j).log_density, largest, sum);
      }
      args.log_marginals[code * args.dim + j] = largest + (math::log(sum) - args.log_components);
    }
  });
}

// c_mnj, of_whole being g_m w_mn.
template <typename T>
__device__ T coefficient(const AggregateCotangents<T>& args, int64_t code, int64_t j, T of_whole, T log_density) {
  const int64_t at = code * args.dim + j;
  return of_whole + args.of_marginals[at] * math::exp(log_density - args.log_components - args.log_marginals[at]);
}

template <typename T>
__device__ T of_whole(const AggregateCotangents<T>& args, int64_t code, int64_t component) {
  const T density = whole_density<T>(args, code, component);
  return args.of_log_q[code] * math::exp(density - args.log_components - args.log_q[code]);
}

template <typename T>
__global__ void aggregate_to_codes_kernel(const AggregateToCodes<T> args) {
  for_each_row_of_warp(args.codes, [&](int64_t code) {
    for (int64_t start = 0; start < args.dim; start += kEach * kWarp) {
      T found[kEach] = {};
      for (int64_t n = 0; n < args.components; ++n) {
        const T whole = of_whole(args, code, n);
        FASTVAE_UNROLL
        for (int k = 0; k < kEach; ++k) {
          const int64_t j = start + k * kWarp + threadIdx.x % kWarp;
          if (j < args.dim) {
            const math::ComponentTerm<T> term = term_of(args, code, n, j);
            found[k] -= coefficient(args, code, j, whole, term.log_density) * term.scaled;
          }
        }
      }
      FASTVAE_UNROLL
      for (int k = 0; k < kEach; ++k) {
        const int64_t j = start + k * kWarp + threadIdx.x % kWarp;
        if (j < args.dim) {
          args.grad_z[code * args.dim + j] = found[k];
        }
      }
    }
  });
}

template <typename T>
__global__ void aggregate_to_components_kernel(const AggregateToComponents<T> args) {
  for_each_row_of_warp(args.components, [&](int64_t n) {
    for (int64_t start = 0; start < args.dim; start += kEach * kWarp) {
      T to_mu[kEach] = {}, to_logvar[kEach] = {};
      for (int64_t code = 0; code < args.codes; ++code) {
        const T whole = of_whole(args, code, n);
        FASTVAE_UNROLL
        for (int k = 0; k < kEach; ++k) {
          const int64_t j = start + k * kWarp + threadIdx.x % kWarp;
          if (j < args.dim) {
            const math::ComponentTerm<T> term = term_of(args, code, n, j);
            const T c = coefficient(args, code, j, whole, term.log_density);
            to_mu[k] += c * term.scaled;
            to_logvar[k] += T(0.5) * c * (term.gap * term.scaled - T(1));
          }
        }
      }
      FASTVAE_UNROLL
      for (int k = 0; k < kEach; ++k) {
        const int64_t j = start + k * kWarp + threadIdx.x % kWarp;
        if (j < args.dim) {
          args.grad_mu[n * args.dim + j] = to_mu[k];
          args.grad_logvar[n * args.dim + j] = to_logvar[k];
        }
      }
    }
  });
}

template <typename T>
void aggregate_posterior_launch(const AggregatePosterior<T>& args, Stream stream) {
  launch("aggregate_posterior", aggregate_posterior_kernel<T>, grid_for_elements(args.codes * kWarp), stream, args);
}

template <typename T>
void aggregate_to_codes_launch(const AggregateToCodes<T>& args, Stream stream) {
  launch("aggregate_to_codes", aggregate_to_codes_kernel<T>, grid_for_elements(args.codes * kWarp), stream, args);
}

template <typename T>
void aggregate_to_components_launch(const AggregateToComponents<T>& args, Stream stream) {
  launch("aggregate_to_components", aggregate_to_components_kernel<T>, grid_for_elements(args.components * kWarp),
         stream, args);
}

FASTVAE_DEFINE_CUDA(aggregate_posterior, AggregatePosterior)
FASTVAE_DEFINE_CUDA(aggregate_to_codes, AggregateToCodes)
FASTVAE_DEFINE_CUDA(aggregate_to_components, AggregateToComponents)

}  // namespace fastvae::cuda
