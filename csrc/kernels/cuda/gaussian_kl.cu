// The divergence of two Gaussians and its gradient on a GPU (kernels.h and math/gaussian_kl.h give the formulas;
// cpu/gaussian_kl.cpp is the twin). One warp a sample: codes have a few dozen coordinates. Memory bound.
#include "../math/gaussian_kl.h"

#include "launch.cuh"

namespace fastvae::cuda {

// Calls body(sample) in every lane of the warp that has it.
template <typename Body>
__device__ void for_each_sample_of_warp(int64_t samples, const Body& body) {
  for (int64_t sample = global_thread() / kWarp; sample < samples; sample += global_threads() / kWarp) {
    body(sample);
  }
}

// Calls body(i, gap, log_ratio, precision) for this lane's coordinates of the sample.
template <typename Args, typename Body>
__device__ void for_each_coordinate_of_lane(const Args& args, int64_t sample, const Body& body) {
  for (int64_t j = threadIdx.x % kWarp; j < args.dim; j += kWarp) {
    const int64_t i = sample * args.dim + j;
    auto gap = args.mu_q[i];
    auto log_ratio = args.logvar_q[i];
    auto precision = decltype(gap)(1);
    if (args.mu_p != nullptr) {
      gap -= args.mu_p[i];
      log_ratio -= args.logvar_p[i];
      precision = math::exp(-args.logvar_p[i]);
    }
    body(i, gap, log_ratio, precision);
  }
}

template <typename T>
__global__ void gaussian_kl_kernel(const GaussianKl<T> args) {
  for_each_sample_of_warp(args.samples, [&](int64_t sample) {
    T sum = T(0);
    for_each_coordinate_of_lane(args, sample, [&](int64_t, T gap, T log_ratio, T precision) {
      sum += math::gaussian_kl(gap, log_ratio, precision);
    });
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) {
      args.kl[sample] = sum;
    }
  });
}

template <typename T>
__global__ void gaussian_kl_backward_kernel(const GaussianKlBackward<T> args) {
  for_each_sample_of_warp(args.samples, [&](int64_t sample) {
    const T grad = args.grad[sample];
    for_each_coordinate_of_lane(args, sample, [&](int64_t i, T gap, T log_ratio, T precision) {
      const math::GaussianKlCotangent<T> to = math::gaussian_kl_backward(grad, gap, log_ratio, precision);
      args.grad_mu_q[i] = to.mu;
      args.grad_logvar_q[i] = to.logvar_q;
      if (args.mu_p != nullptr) {
        args.grad_mu_p[i] = -to.mu;
        args.grad_logvar_p[i] = to.logvar_p;
      }
    });
  });
}

template <typename T>
void gaussian_kl_launch(const GaussianKl<T>& args, Stream stream) {
  launch("gaussian_kl", gaussian_kl_kernel<T>, grid_for_elements(args.samples * kWarp), stream, args);
}

template <typename T>
void gaussian_kl_backward_launch(const GaussianKlBackward<T>& args, Stream stream) {
  launch("gaussian_kl_backward", gaussian_kl_backward_kernel<T>, grid_for_elements(args.samples * kWarp), stream, args);
}

FASTVAE_DEFINE_CUDA(gaussian_kl, GaussianKl)
FASTVAE_DEFINE_CUDA(gaussian_kl_backward, GaussianKlBackward)

}  // namespace fastvae::cuda
