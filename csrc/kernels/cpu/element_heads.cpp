// Likelihoods of elements with several outputs each: residuals, log probabilities and second derivatives (kernels.h).
//
// Cost per element: 1 to 4 exponentials and a logarithm, reads 1 + outputs (and its weight), writes outputs. PyTorch's
// operators pass over them 8 to 40 times.
#include "../kernels.h"
#include "clones.h"
#include "lane_sum.h"

namespace fastvae::cpu {

// What one element adds to its sample's log probability; with its residuals, at data[i * stride].
template <bool has_weight, typename Rules, typename T>
FASTVAE_INLINE T element_terms(const Rules& rules, const T* y, const T* x, const T* weight, T (&r)[Rules::kOutputs],
                               int64_t stride) {
  T outputs[Rules::kOutputs];
  for (int i = 0; i < Rules::kOutputs; ++i) {
    outputs[i] = y[i * stride];
  }
  const T log_prob = rules.first(outputs, x[0], r);
  if constexpr (!has_weight) {
    return log_prob;
  }
  const T w = weight[0];
  for (int i = 0; i < Rules::kOutputs; ++i) {
    r[i] = w == T(0) ? T(0) : w * r[i];
  }
  return w == T(0) ? T(0) : w * log_prob;
}

template <bool has_weight, typename Rules, typename T>
FASTVAE_INLINE void element_residual_rows(const ElementHeadResidual<T>& args, int64_t begin, int64_t end) {
  constexpr int kLanes = LaneSum<T>::kLanes, kOutputs = Rules::kOutputs;
  const Rules rules(args.likelihood.numbers);
  const int64_t n = args.size;
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* y = args.y + sample * kOutputs * n;
    const T* x = args.x + sample * n;
    const T* weight = has_weight ? args.weight + sample * n : x;
    T* residual = args.residual == nullptr ? nullptr : args.residual + sample * kOutputs * n;
    LaneSum<T> sum;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      T found[kOutputs][kLanes];
#pragma GCC unroll 1
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t at = j + lane;
        T r[kOutputs];
        sum.lanes[lane] += element_terms<has_weight>(rules, y + at, x + at, weight + at, r, n);
        for (int i = 0; i < kOutputs; ++i) {
          found[i][lane] = r[i];
        }
      }
      if (residual != nullptr) {
        for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 1
          for (int lane = 0; lane < kLanes; ++lane) {
            residual[i * n + j + lane] = found[i][lane];
          }
        }
      }
    }
    for (; j < n; ++j) {
      T r[kOutputs];
      sum.lanes[0] += element_terms<has_weight>(rules, y + j, x + j, weight + j, r, n);
      for (int i = 0; i < kOutputs && residual != nullptr; ++i) {
        residual[i * n + j] = r[i];
      }
    }
    if (args.log_prob != nullptr) {
      args.log_prob[sample] = sum.total();
    }
  }
}

template <bool has_weight, typename Rules, typename T>
FASTVAE_INLINE void element_tangent_rows(const ElementHeadTangent<T>& args, int64_t begin, int64_t end) {
  constexpr int kOutputs = Rules::kOutputs;
  const Rules rules(args.likelihood.numbers);
  const int64_t n = args.size;
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t offset = sample * kOutputs * n;
    const T* y = args.y + offset;
    const T* dot = args.dot + offset;
    const T* x = args.x + sample * n;
    const T* weight = has_weight ? args.weight + sample * n : x;
    T* out = args.delta_dot + offset;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      T outputs[kOutputs], v[kOutputs], bent[kOutputs];
      for (int i = 0; i < kOutputs; ++i) {
        outputs[i] = y[i * n + j];
        v[i] = dot[i * n + j];
      }
      rules.second(outputs, x[j], v, bent);
      for (int i = 0; i < kOutputs; ++i) {
        out[i * n + j] = !has_weight ? bent[i] : (weight[j] == T(0) ? T(0) : weight[j] * bent[i]);
      }
    }
    if (args.cotangent != nullptr) {
      const T c = args.cotangent[sample];
      const T* residual = args.residual + offset;
#pragma GCC ivdep
      for (int64_t j = 0; j < kOutputs * n; ++j) {
        out[j] += c * residual[j];
      }
    }
  }
}

#define FASTVAE_CASE(ROWS, KIND, Rules)        \
  case ElementHead::KIND:                      \
    if (args.weight == nullptr) {              \
      ROWS<false, Rules<T>>(args, begin, end); \
    } else {                                   \
      ROWS<true, Rules<T>>(args, begin, end);  \
    }                                          \
    break;
#define FASTVAE_RESIDUAL_CASE(KIND, Rules) FASTVAE_CASE(element_residual_rows, KIND, Rules)
#define FASTVAE_TANGENT_CASE(KIND, Rules) FASTVAE_CASE(element_tangent_rows, KIND, Rules)

template <typename T>
FASTVAE_INLINE void element_head_residual_template(const ElementHeadResidual<T>& args, int64_t begin, int64_t end) {
  switch (args.likelihood.kind) { FASTVAE_ELEMENT_HEADS(FASTVAE_RESIDUAL_CASE) }
}

template <typename T>
FASTVAE_INLINE void element_head_tangent_template(const ElementHeadTangent<T>& args, int64_t begin, int64_t end) {
  switch (args.likelihood.kind) { FASTVAE_ELEMENT_HEADS(FASTVAE_TANGENT_CASE) }
}

#undef FASTVAE_TANGENT_CASE
#undef FASTVAE_RESIDUAL_CASE
#undef FASTVAE_CASE

FASTVAE_DEFINE_CPU(element_head_residual, ElementHeadResidual)
FASTVAE_DEFINE_CPU(element_head_tangent, ElementHeadTangent)

}  // namespace fastvae::cpu
