// Likelihood heads of one run of outputs: a pixel's classes, or outputs that lie side by side.
#pragma once

#include <cmath>

#include "../kernels.h"
#include "clones.h"
#include "lane_sum.h"

namespace fastvae::cpu {

// One run of outputs whose bias, if any, lies beside them.
template <typename Head, bool has_bias, typename T>
FASTVAE_INLINE void independent_head_run(const Head& head, const T* a, const T* bias, const T* x, T* residual,
                                         int64_t n, bool wants_log_prob, LaneSum<T>& sum) {
  constexpr int kLanes = LaneSum<T>::kLanes;
  if (!wants_log_prob) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      residual[j] = head.residual(has_bias ? a[j] + bias[j] : a[j], x[j]);
    }
    return;
  }
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    T lane_residual[kLanes];
#pragma GCC unroll 1
    for (int lane = 0; lane < kLanes; ++lane) {
      const math::HeadValue<T> both = head.both(has_bias ? a[j + lane] + bias[j + lane] : a[j + lane], x[j + lane]);
      sum.lanes[lane] += both.log_prob;
      lane_residual[lane] = both.residual;
    }
    if (residual != nullptr) {
#pragma GCC unroll 1
      for (int lane = 0; lane < kLanes; ++lane) {
        residual[j + lane] = lane_residual[lane];
      }
    }
  }
  for (; j < n; ++j) {
    const math::HeadValue<T> both = head.both(has_bias ? a[j] + bias[j] : a[j], x[j]);
    sum.lanes[0] += both.log_prob;
    if (residual != nullptr) {
      residual[j] = both.residual;
    }
  }
}

template <typename T>
struct CategoricalRun {
  T largest;
  T normaliser;  // sum of exp(a + bias - largest)
  T log_prob;    // of the chosen class
};

// Two passes over logits in the L1 cache, with one exponential each. `weights` [classes], if not null, receives the
// exponentials.
template <bool has_bias, typename T>
FASTVAE_INLINE CategoricalRun<T> categorical_run(const T* a, const T* bias, int64_t chosen, int64_t classes,
                                                 T* weights) {
  constexpr int kLanes = LaneSum<T>::kLanes;
  const auto logit = [&](int64_t c) FASTVAE_LAMBDA_INLINE { return has_bias ? a[c] + bias[c] : a[c]; };
  const int64_t whole = classes / kLanes * kLanes;
  T largest = logit(0);
  if (whole > 0) {
    T lanes[kLanes];
#pragma GCC unroll 1
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = logit(lane);
    }
    for (int64_t c = kLanes; c < whole; c += kLanes) {
#pragma GCC unroll 1
      for (int lane = 0; lane < kLanes; ++lane) {
        const T value = logit(c + lane);
        lanes[lane] = value > lanes[lane] ? value : lanes[lane];
      }
    }
    largest = combine_lanes(lanes, [](T a, T b) FASTVAE_LAMBDA_INLINE { return a > b ? a : b; });
  }
  for (int64_t c = whole; c < classes; ++c) {
    const T value = logit(c);
    largest = value > largest ? value : largest;
  }
  const T of_chosen = logit(chosen);  // weights may lie over a
  LaneSum<T> sum;
  for (int64_t c = 0; c < whole; c += kLanes) {
    T values[kLanes];
#pragma GCC unroll 1
    for (int lane = 0; lane < kLanes; ++lane) {
      values[lane] = math::exp(logit(c + lane) - largest);
      sum.lanes[lane] += values[lane];
    }
    if (weights != nullptr) {
#pragma GCC unroll 1
      for (int lane = 0; lane < kLanes; ++lane) {
        weights[c + lane] = values[lane];
      }
    }
  }
  for (int64_t c = whole; c < classes; ++c) {
    const T value = math::exp(logit(c) - largest);
    sum.lanes[c - whole] += value;
    if (weights != nullptr) {
      weights[c] = value;
    }
  }
  const T normaliser = sum.total();
  return {largest, normaliser, of_chosen - largest - std::log(normaliser)};
}

}  // namespace fastvae::cpu
