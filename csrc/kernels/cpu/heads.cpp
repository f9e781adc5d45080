// Likelihood heads: residual and log probability from the last layer's output, and their tangent (kernels.h).
//
// Cost per output: 1 exponential (2 with the log probability, for the logarithm's series), reads 2, writes 1.
#include "head_runs.h"

namespace fastvae::cpu {

template <typename Head, typename T>
FASTVAE_INLINE void independent_head_rows(const HeadResidual<T>& args, int64_t begin, int64_t end) {
  const Head head(args.likelihood);
  // Without a bias a sample is one run, which matters for images of one to three channels.
  const int64_t runs = args.bias == nullptr ? 1 : args.positions;
  const int64_t n = args.positions * args.channels / runs;
  for (int64_t sample = begin; sample < end; ++sample) {
    LaneSum<T> sum;
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t offset = (sample * runs + run) * n;
      T* residual = args.residual == nullptr ? nullptr : args.residual + offset;
      if (args.bias == nullptr) {
        independent_head_run<Head, false>(head, args.a + offset, args.bias, args.x + offset, residual, n,
                                          args.log_prob != nullptr, sum);
      } else {
        independent_head_run<Head, true>(head, args.a + offset, args.bias, args.x + offset, residual, n,
                                         args.log_prob != nullptr, sum);
      }
    }
    if (args.log_prob != nullptr) {
      args.log_prob[sample] = sum.total();
    }
  }
}

template <typename T>
FASTVAE_INLINE void categorical_head_rows(const HeadResidual<T>& args, int64_t begin, int64_t end) {
  const int64_t classes = args.likelihood.classes;
  const int64_t pixels = args.positions * args.channels / classes;
  const int64_t groups = args.channels / classes;
  for (int64_t sample = begin; sample < end; ++sample) {
    T sum = T(0);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const int64_t index = sample * pixels + pixel;
      const T* a = args.a + index * classes;
      T* residual = args.residual == nullptr ? nullptr : args.residual + index * classes;
      const int64_t chosen = math::class_of(args.x[index], classes);
      const T defect = math::class_defect(args.x[index]);
      const CategoricalRun<T> run =
          args.bias == nullptr
              ? categorical_run<false>(a, args.bias, chosen, classes, residual)
              : categorical_run<true>(a, args.bias + (pixel % groups) * classes, chosen, classes, residual);
      if (residual != nullptr) {
        const T scale = T(-1) / run.normaliser;
#pragma GCC ivdep
        for (int64_t c = 0; c < classes; ++c) {
          residual[c] *= scale;
        }
        residual[chosen] += T(1) + defect;
      }
      sum += run.log_prob + defect;
    }
    if (args.log_prob != nullptr) {
      args.log_prob[sample] = sum;
    }
  }
}

template <typename T>
FASTVAE_INLINE void head_residual_template(const HeadResidual<T>& args, int64_t begin, int64_t end) {
  switch (args.likelihood.kind) {
#define FASTVAE_CASE(kind, Head)                      \
  case Likelihood::kind:                              \
    independent_head_rows<Head<T>>(args, begin, end); \
    break;
    FASTVAE_INDEPENDENT_HEADS(FASTVAE_CASE)
#undef FASTVAE_CASE
    case Likelihood::kCategorical:
      categorical_head_rows(args, begin, end);
      break;
  }
}

template <typename Head, typename T>
FASTVAE_INLINE void independent_tangent_rows(const HeadTangent<T>& args, int64_t begin, int64_t end) {
  const Head head(args.likelihood);
  const int64_t n = args.positions * args.channels;
  for (int64_t sample = begin; sample < end; ++sample) {
    const T c = args.cotangent == nullptr ? T(0) : args.cotangent[sample];
    const int64_t offset = sample * n;
    if (args.grad_x != nullptr) {
#pragma GCC ivdep
      for (int64_t i = offset; i < offset + n; ++i) {
        args.grad_x[i] += head.cross(args.residual[i], args.x[i]) * args.adot[i];
      }
    }
#pragma GCC ivdep
    for (int64_t i = offset; i < offset + n; ++i) {
      const T r = args.residual[i];
      args.delta_dot[i] = head.curvature(r, args.x[i]) * args.adot[i] + c * r;
    }
  }
}

template <typename T>
FASTVAE_INLINE void categorical_tangent_rows(const HeadTangent<T>& args, int64_t begin, int64_t end) {
  const int64_t classes = args.likelihood.classes;
  const int64_t pixels = args.positions * args.channels / classes;
  for (int64_t sample = begin; sample < end; ++sample) {
    const T cotangent = args.cotangent == nullptr ? T(0) : args.cotangent[sample];
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const int64_t index = sample * pixels + pixel;
      const T* residual = args.residual + index * classes;
      const T* adot = args.adot + index * classes;
      T* out = args.delta_dot + index * classes;
      const int64_t chosen = math::class_of(args.x[index], classes);
      // p = onehot - residual; <p, u> = u_chosen - <residual, u>
      LaneSum<T> lanes;
      constexpr int kLanes = LaneSum<T>::kLanes;
      for (int64_t c = 0; c < classes; c += kLanes) {
        const int count = static_cast<int>(classes - c < kLanes ? classes - c : kLanes);
        for (int lane = 0; lane < count; ++lane) {
          lanes.lanes[lane] += residual[c + lane] * adot[c + lane];
        }
      }
      const T mean = adot[chosen] - lanes.total();
      const T at_chosen = adot[chosen];
#pragma GCC ivdep
      for (int64_t c = 0; c < classes; ++c) {
        out[c] = residual[c] * (adot[c] - mean + cotangent);
      }
      out[chosen] -= at_chosen - mean;  // the onehot part of p
    }
  }
}

template <typename T>
FASTVAE_INLINE void head_tangent_template(const HeadTangent<T>& args, int64_t begin, int64_t end) {
  switch (args.likelihood.kind) {
#define FASTVAE_CASE(kind, Head)                         \
  case Likelihood::kind:                                 \
    independent_tangent_rows<Head<T>>(args, begin, end); \
    break;
    FASTVAE_INDEPENDENT_HEADS(FASTVAE_CASE)
#undef FASTVAE_CASE
    case Likelihood::kCategorical:
      categorical_tangent_rows(args, begin, end);
      break;
  }
}

FASTVAE_DEFINE_CPU(head_residual, HeadResidual)
FASTVAE_DEFINE_CPU(head_tangent, HeadTangent)

}  // namespace fastvae::cpu
