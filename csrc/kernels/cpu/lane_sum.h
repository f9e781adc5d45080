// Sums that vectorise.
#pragma once

#include "clones.h"

namespace fastvae::cpu {

// Sums a row in `kLanes` partial sums: vectorises without reassociation flags, and is the same in every run.
template <typename T>
struct LaneSum {
  static constexpr int kLanes = 16;
  T lanes[kLanes] = {};
  FASTVAE_INLINE T total() const {
    T sum = T(0);
    for (const T lane : lanes) {
      sum += lane;
    }
    return sum;
  }
};

}  // namespace fastvae::cpu
