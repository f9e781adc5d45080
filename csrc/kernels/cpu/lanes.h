// Vectors of the compiler's own, for blocks of sums that must stay in registers: what auto-vectorisation makes of an
// array of sums depends on its mood.
#pragma once

#include "clones.h"

namespace fastvae::cpu {

template <typename T, int kLanes>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T)), may_alias));
};

template <typename T>
struct Lanes<T, 1> {
  using Vector = T;
};

template <int kLanes, typename T>
FASTVAE_INLINE auto& lanes_at(T* place) {
  return *reinterpret_cast<typename Lanes<T, kLanes>::Vector*>(place);
}

template <int kLanes, typename T>
FASTVAE_INLINE const auto& lanes_at(const T* place) {
  return *reinterpret_cast<const typename Lanes<T, kLanes>::Vector*>(place);
}

}  // namespace fastvae::cpu
