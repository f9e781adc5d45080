// Vectors of the compiler's own, for blocks of sums that must stay in registers: what auto-vectorisation makes of an
// array of sums depends on its mood.
#pragma once

#include <cstring>

#include "clones.h"

namespace fastvae::cpu {

template <typename T, int kLanes>
struct Lanes {
  // NOLINTNEXTLINE(modernize-use-using): an alias takes no such attribute
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
};

template <typename T>
struct Lanes<T, 1> {
  using Vector = T;
};

// From and to memory of any alignment.
template <typename Vector, typename T>
FASTVAE_INLINE void load_lanes(Vector& lanes, const T* from) {
  std::memcpy(&lanes, from, sizeof(Vector));
}

template <typename Vector, typename T>
FASTVAE_INLINE void store_lanes(T* to, const Vector& lanes) {
  std::memcpy(to, &lanes, sizeof(Vector));
}

}  // namespace fastvae::cpu
