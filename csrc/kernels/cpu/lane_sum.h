// Sums that vectorise.
#pragma once

#include "clones.h"

namespace fastvae::cpu {

// Halves upon halves, in registers: one after the other, lanes cost as much as a hundred elements.
template <int kLanes, typename T, typename Combine>
FASTVAE_INLINE T combine_lanes(const T (&lanes)[kLanes], const Combine& combine) {
  T left[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    left[lane] = lanes[lane];
  }
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      left[lane] = combine(left[lane], left[lane + half]);
    }
  }
  return left[0];
}

// Sums a row in `kLanes` partial sums: vectorises without reassociation flags, and is the same in every run.
// The loops over lanes carry `#pragma GCC unroll 1`: unrolled, as GCC does with a loop of one vector, they stay scalar,
// which costs three times as much [measured].
template <typename T>
struct LaneSum {
  static constexpr int kLanes = 16;
  T lanes[kLanes] = {};
  FASTVAE_INLINE T total() const {
    return combine_lanes(lanes, [](T a, T b) FASTVAE_LAMBDA_INLINE { return a + b; });
  }
};

}  // namespace fastvae::cpu
