// Likelihood heads on a GPU (kernels.h gives the formulas; cpu/heads.cpp is the twin).
//
// One block a sample, so that its log probability is one reduction in a fixed order. Under a categorical likelihood
// each warp of the block takes an observed number with its logits: three reads of them, which stay in L1.
#include "launch.cuh"

namespace fastvae::cuda {

template <typename Head, typename T>
__global__ void independent_head_kernel(const HeadResidual<T> args, const Head head) {
  const int64_t size = args.positions * args.channels;
  for (int64_t sample = blockIdx.x; sample < args.samples; sample += gridDim.x) {
    const T* a = args.a + sample * size;
    const T* x = args.x + sample * size;
    T* residual = args.residual == nullptr ? nullptr : args.residual + sample * size;
    T sum = T(0);
    for (Walk at(threadIdx.x, blockDim.x, size, args.channels); at.inside(); at.next()) {
      const T value = args.bias == nullptr ? a[at.i] : a[at.i] + args.bias[at.column];
      if (args.log_prob == nullptr) {
        residual[at.i] = head.residual(value, x[at.i]);
        continue;
      }
      const math::HeadValue<T> both = head.both(value, x[at.i]);
      sum += both.log_prob;
      if (residual != nullptr) {
        residual[at.i] = both.residual;
      }
    }
    if (args.log_prob != nullptr) {
      sum = block_sum(sum);
      if (threadIdx.x == 0) {
        args.log_prob[sample] = sum;
      }
    }
  }
}

template <typename T>
__global__ void categorical_head_kernel(const HeadResidual<T> args) {
  const int64_t classes = args.likelihood.classes;
  const int64_t groups = args.channels / classes;
  const int64_t pixels = args.positions * groups;
  const int64_t lane = threadIdx.x % kWarp;
  for (int64_t sample = blockIdx.x; sample < args.samples; sample += gridDim.x) {
    T sum = T(0);
    for (int64_t pixel = threadIdx.x / kWarp; pixel < pixels; pixel += blockDim.x / kWarp) {
      const int64_t index = sample * pixels + pixel;
      const T* a = args.a + index * classes;
      const T* bias = args.bias == nullptr ? nullptr : args.bias + (pixel % groups) * classes;
      T* residual = args.residual == nullptr ? nullptr : args.residual + index * classes;
      const int64_t chosen = math::class_of(args.x[index], classes);
      const T defect = math::class_defect(args.x[index]);
      T largest = lane < classes ? (bias == nullptr ? a[lane] : a[lane] + bias[lane]) : -math::Ieee<T>::kInfinity;
      T of_chosen = lane == chosen ? largest : T(0);
      for (int64_t c = lane + kWarp; c < classes; c += kWarp) {
        const T value = bias == nullptr ? a[c] : a[c] + bias[c];
        largest = value > largest ? value : largest;
        of_chosen = c == chosen ? value : of_chosen;
      }
      largest = warp_max(largest);
      of_chosen = warp_sum(of_chosen);
      T normaliser = T(0);
      for (int64_t c = lane; c < classes; c += kWarp) {
        const T e = math::exp((bias == nullptr ? a[c] : a[c] + bias[c]) - largest);
        normaliser += e;
        if (residual != nullptr) {
          residual[c] = e;
        }
      }
      normaliser = warp_sum(normaliser);
      if (residual != nullptr) {
        const T scale = T(-1) / normaliser;
        for (int64_t c = lane; c < classes; c += kWarp) {
          residual[c] = residual[c] * scale + (c == chosen ? T(1) + defect : T(0));
        }
      }
      if (lane == 0) {
        sum += of_chosen - largest - std::log(normaliser) + defect;
      }
    }
    if (args.log_prob != nullptr) {
      sum = block_sum(sum);
      if (threadIdx.x == 0) {
        args.log_prob[sample] = sum;
      }
    }
  }
}

template <typename T>
void head_residual_launch(const HeadResidual<T>& args, Stream stream) {
  const Grid grid{args.samples};
  switch (args.likelihood.kind) {
    case Likelihood::kBernoulli:
      launch("head_residual", independent_head_kernel<math::BernoulliHead<T>, T>, grid, stream, args,
             math::BernoulliHead<T>(args.likelihood));
      break;
    case Likelihood::kGaussian:
      launch("head_residual", independent_head_kernel<math::GaussianHead<T>, T>, grid, stream, args,
             math::GaussianHead<T>(args.likelihood));
      break;
    case Likelihood::kCategorical:
      launch("head_residual", categorical_head_kernel<T>, grid, stream, args);
      break;
  }
}

template <typename Head, typename T>
__global__ void independent_tangent_kernel(const HeadTangent<T> args, const Head head) {
  const int64_t size = args.positions * args.channels;
  for (int64_t sample = blockIdx.x; sample < args.samples; sample += gridDim.x) {
    const T cotangent = args.cotangent == nullptr ? T(0) : args.cotangent[sample];
    for (int64_t i = sample * size + threadIdx.x; i < (sample + 1) * size; i += blockDim.x) {
      const T adot = args.adot[i];
      const T x = args.x[i];
      const T r = args.residual[i];
      if (args.grad_x != nullptr) {
        args.grad_x[i] += head.cross(x) * adot;
      }
      args.delta_dot[i] = head.curvature(r, x) * adot + cotangent * r;
    }
  }
}

template <typename T>
__global__ void categorical_tangent_kernel(const HeadTangent<T> args) {
  const int64_t classes = args.likelihood.classes;
  const int64_t pixels = args.positions * args.channels / classes;
  const int64_t lane = threadIdx.x % kWarp;
  for (int64_t sample = blockIdx.x; sample < args.samples; sample += gridDim.x) {
    const T cotangent = args.cotangent == nullptr ? T(0) : args.cotangent[sample];
    for (int64_t pixel = threadIdx.x / kWarp; pixel < pixels; pixel += blockDim.x / kWarp) {
      const int64_t index = sample * pixels + pixel;
      const T* residual = args.residual + index * classes;
      const T* adot = args.adot + index * classes;
      T* out = args.delta_dot + index * classes;
      const int64_t chosen = math::class_of(args.x[index], classes);
      // p = onehot - residual; <p, u> = u_chosen - <residual, u>
      T mean = T(0);
      for (int64_t c = lane; c < classes; c += kWarp) {
        mean += (c == chosen ? T(1) - residual[c] : -residual[c]) * adot[c];
      }
      mean = warp_sum(mean);
      for (int64_t c = lane; c < classes; c += kWarp) {
        const T centred = adot[c] - mean;
        const T value = residual[c] * (centred + cotangent);
        out[c] = c == chosen ? value - centred : value;
      }
    }
  }
}

template <typename T>
void head_tangent_launch(const HeadTangent<T>& args, Stream stream) {
  const Grid grid{args.samples};
  switch (args.likelihood.kind) {
    case Likelihood::kBernoulli:
      launch("head_tangent", independent_tangent_kernel<math::BernoulliHead<T>, T>, grid, stream, args,
             math::BernoulliHead<T>(args.likelihood));
      break;
    case Likelihood::kGaussian:
      launch("head_tangent", independent_tangent_kernel<math::GaussianHead<T>, T>, grid, stream, args,
             math::GaussianHead<T>(args.likelihood));
      break;
    case Likelihood::kCategorical:
      launch("head_tangent", categorical_tangent_kernel<T>, grid, stream, args);
      break;
  }
}

FASTVAE_DEFINE_CUDA(head_residual, HeadResidual)
FASTVAE_DEFINE_CUDA(head_tangent, HeadTangent)

}  // namespace fastvae::cuda
