// Likelihood heads on a GPU (kernels.h gives the formulas; cpu/heads.cpp is the twin).
//
// A block takes a chunk of a sample, so that few samples fill the device, too; log probabilities are one reduction in a
// fixed order a chunk, then one over chunks. Memory bound: under a categorical likelihood 16 lanes take an observed
// number with its logits, 16 bytes at a time, which they read once and keep in registers (the first 256; beyond them,
// three times). With more lanes the reductions would cost more than the logits.
#include "heads.cuh"

namespace fastvae::cuda {

constexpr int kHeld = 16;   // logits that a lane keeps
constexpr int kLanes = 16;  // that share an observed number

template <typename Head, typename T>
__global__ void independent_head_kernel(const HeadResidual<T> args, const Head head, int64_t chunks) {
  const int64_t size = args.positions * args.channels;
  for (int64_t block = blockIdx.x; block < args.samples * chunks; block += gridDim.x) {
    const HeadChunk chunk(block, chunks, size);
    const T* a = args.a + chunk.sample * size;
    const T* x = args.x + chunk.sample * size;
    T* residual = args.residual == nullptr ? nullptr : args.residual + chunk.sample * size;
    T sum = T(0);
    for (Walk at(chunk.first + threadIdx.x, blockDim.x, chunk.end, args.channels); at.inside(); at.next()) {
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
    note_log_prob(args, block, sum);
  }
}

// Logits come kPack at a time, which divides their number.
template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 1)
    categorical_head_kernel(const HeadResidual<T> args, int64_t chunks) {
  using Logits = Packed<T, kPack>;
  const auto classes = static_cast<int>(args.likelihood.classes);
  const int64_t groups = args.channels / classes;
  const int64_t pixels = args.positions * groups;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t of_warp = threadIdx.x / kWarp * (kWarp / kLanes), in_warp = threadIdx.x % kWarp / kLanes;
  for (int64_t block = blockIdx.x; block < args.samples * chunks; block += gridDim.x) {
    const HeadChunk chunk(block, chunks, pixels);
    T sum = T(0);
    // A warp stays together: lanes for which there is no number left have no logits.
    for (int64_t at = chunk.first + of_warp; at < chunk.end; at += blockDim.x / kLanes) {
      const bool is_one = at + in_warp < chunk.end;
      const int64_t pixel = is_one ? at + in_warp : chunk.end - 1;
      const int64_t index = chunk.sample * pixels + pixel;
      const T* a = args.a + index * classes;
      const int64_t group = groups == 1 ? 0 : pixel % groups;  // a division of 64 bits takes as long as the logits
      const T* bias = args.bias == nullptr ? nullptr : args.bias + group * classes;
      T* residual = args.residual == nullptr || !is_one ? nullptr : args.residual + index * classes;
      const auto logit = [&](int c) { return bias == nullptr ? a[c] : a[c] + bias[c]; };
      const int own = is_one ? classes : 0;  // the residual may lie where the logits do
      const auto chosen = static_cast<int>(math::class_of(args.x[index], classes));
      const T of_chosen = is_one ? logit(chosen) : T(0);
      const T defect = math::class_defect(args.x[index]);
      T held[kHeld];
      T largest = -math::Ieee<T>::kInfinity, normaliser = T(0);
#pragma unroll
      for (int k = 0; k < kHeld; k += kPack) {
        const int first = k * kLanes + lane * kPack;
        Logits found{};
        if (first < own) {
          found = *reinterpret_cast<const Logits*>(a + first);
        }
#pragma unroll
        for (int c = 0; c < kPack; ++c) {
          held[k + c] = first >= own      ? -math::Ieee<T>::kInfinity
                        : bias == nullptr ? found.value[c]
                                          : found.value[c] + bias[first + c];
          largest = held[k + c] > largest ? held[k + c] : largest;
        }
      }
      for (int c = kHeld * kLanes + lane; c < own; c += kLanes) {
        const T value = logit(c);
        largest = value > largest ? value : largest;
      }
      largest = warp_max<kLanes>(largest);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        // Of minus infinity math::exp gives a little more than nothing, which is lost beside the largest logit's 1.
        held[k] = math::exp(held[k] - largest);
        normaliser += held[k];
      }
      for (int c = kHeld * kLanes + lane; c < own; c += kLanes) {
        const T e = math::exp(logit(c) - largest);
        normaliser += e;
        if (residual != nullptr) {
          residual[c] = e;
        }
      }
      normaliser = warp_sum<kLanes>(normaliser);
      if (residual != nullptr) {
        const T scale = T(-1) / normaliser;
        const auto one_hot = [&](int c) { return c == chosen ? T(1) + defect : T(0); };
#pragma unroll
        for (int k = 0; k < kHeld; k += kPack) {
          const int first = k * kLanes + lane * kPack;
          Logits found;
#pragma unroll
          for (int c = 0; c < kPack; ++c) {
            found.value[c] = held[k + c] * scale + one_hot(first + c);
          }
          if (first < own) {
            *reinterpret_cast<Logits*>(residual + first) = found;
          }
        }
        for (int c = kHeld * kLanes + lane; c < own; c += kLanes) {
          residual[c] = residual[c] * scale + one_hot(c);
        }
      }
      if (lane == 0 && is_one) {
        sum += of_chosen - largest - std::log(normaliser) + defect;
      }
    }
    note_log_prob(args, block, sum);
  }
}

// As unsummed_chunks of a sample's numbers, but for those with a choice of classes.
inline int64_t unsummed_chunks(const LikelihoodSpec& likelihood, int64_t positions, int64_t channels) {
  return likelihood.kind == Likelihood::kCategorical ? head_chunks(likelihood, positions, channels)
                                                     : unsummed_chunks(positions * channels);
}

template <typename T>
void head_residual_launch(const HeadResidual<T>& args, Stream stream) {
  const int64_t chunks = args.log_prob == nullptr  ? unsummed_chunks(args.likelihood, args.positions, args.channels)
                         : args.partial == nullptr ? 1
                                                   : head_chunks(args.likelihood, args.positions, args.channels);
  const Grid grid{args.samples * chunks};
  switch (args.likelihood.kind) {
#define FASTVAE_CASE(kind, Head)                                                                               \
  case Likelihood::kind:                                                                                       \
    launch("head_residual", independent_head_kernel<Head<T>, T>, grid, stream, args, Head<T>(args.likelihood), \
           chunks);                                                                                            \
    break;
    FASTVAE_INDEPENDENT_HEADS(FASTVAE_CASE)
#undef FASTVAE_CASE
    case Likelihood::kCategorical: {
      const bool wide = args.likelihood.classes % kWidePack<T> == 0 && is_aligned_for_packs(args.a) &&
                        is_aligned_for_packs(args.residual);
      launch("head_residual", wide ? categorical_head_kernel<T, kWidePack<T>> : categorical_head_kernel<T, 1>, grid,
             stream, args, chunks);
      break;
    }
  }
  if (args.log_prob != nullptr && args.partial != nullptr) {
    sum_chunks<T>(args.partial, args.log_prob, args.samples, chunks, 1, stream);
  }
}

template <typename Head, typename T>
__global__ void independent_tangent_kernel(const HeadTangent<T> args, const Head head, int64_t chunks) {
  const int64_t size = args.positions * args.channels;
  for (int64_t block = blockIdx.x; block < args.samples * chunks; block += gridDim.x) {
    const HeadChunk chunk(block, chunks, size);
    const T cotangent = args.cotangent == nullptr ? T(0) : args.cotangent[chunk.sample];
    const int64_t begin = chunk.sample * size;
    for (int64_t i = begin + chunk.first + threadIdx.x; i < begin + chunk.end; i += blockDim.x) {
      const T adot = args.adot[i];
      const T x = args.x[i];
      const T r = args.residual[i];
      if (args.grad_x != nullptr) {
        args.grad_x[i] += head.cross(r, x) * adot;
      }
      args.delta_dot[i] = head.curvature(r, x) * adot + cotangent * r;
    }
  }
}

template <typename T>
__global__ void categorical_tangent_kernel(const HeadTangent<T> args, int64_t chunks) {
  const int64_t classes = args.likelihood.classes;
  const int64_t pixels = args.positions * args.channels / classes;
  const int64_t lane = threadIdx.x % kWarp;
  for (int64_t block = blockIdx.x; block < args.samples * chunks; block += gridDim.x) {
    const HeadChunk chunk(block, chunks, pixels);
    const T cotangent = args.cotangent == nullptr ? T(0) : args.cotangent[chunk.sample];
    for (int64_t pixel = chunk.first + threadIdx.x / kWarp; pixel < chunk.end; pixel += blockDim.x / kWarp) {
      const int64_t index = chunk.sample * pixels + pixel;
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
  const int64_t chunks = unsummed_chunks(args.likelihood, args.positions, args.channels);
  const Grid grid{args.samples * chunks};
  switch (args.likelihood.kind) {
#define FASTVAE_CASE(kind, Head)                                                                                 \
  case Likelihood::kind:                                                                                         \
    launch("head_tangent", independent_tangent_kernel<Head<T>, T>, grid, stream, args, Head<T>(args.likelihood), \
           chunks);                                                                                              \
    break;
    FASTVAE_INDEPENDENT_HEADS(FASTVAE_CASE)
#undef FASTVAE_CASE
    case Likelihood::kCategorical:
      launch("head_tangent", categorical_tangent_kernel<T>, grid, stream, args, chunks);
      break;
  }
}

FASTVAE_DEFINE_CUDA(head_residual, HeadResidual)
FASTVAE_DEFINE_CUDA(head_tangent, HeadTangent)

}  // namespace fastvae::cuda
