// Squares of lanes transposed in registers, for panels of products.
#pragma once

#include <cstdint>
#include <utility>

#include "lanes.h"

namespace fastvae::cpu {

// Of two rows the blocks that stand first (or second) in each pair of blocks of kDistance lanes.
template <int kDistance, bool kSecond, typename Vector, size_t... j>
FASTVAE_INLINE void interleave(Vector& to, const Vector& a, const Vector& b, std::index_sequence<j...>) {
  constexpr int kFrom[] = {static_cast<int>((j & kDistance) == 0 ? (kSecond ? j + kDistance : j)
                                                                 : sizeof...(j) + j - (kSecond ? 0 : kDistance))...};
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  to = __builtin_shufflevector(a, b, kFrom[j]...);
#else
  constexpr int kLanes = sizeof...(j);
  ((to[j] = kFrom[j] < kLanes ? a[kFrom[j]] : b[kFrom[j] - kLanes]), ...);
#endif
}

// One of the log2(lanes) steps of a transposition: blocks of kDistance lanes off the diagonal change places.
template <int kDistance, int kLanes, typename Vector>
FASTVAE_INLINE void exchange_blocks(Vector (&rows)[kLanes]) {
  constexpr auto kAll = std::make_index_sequence<kLanes>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kDistance) == 0) {
      const Vector a = rows[i], b = rows[i + kDistance];
      interleave<kDistance, false>(rows[i], a, b, kAll);
      interleave<kDistance, true>(rows[i + kDistance], a, b, kAll);
    }
  }
}

// In log2(kLanes) steps; kLanes is 8 or 16.
template <int kLanes, typename Vector>
FASTVAE_INLINE void transpose_lanes(Vector (&rows)[kLanes]) {
  exchange_blocks<1>(rows);
  exchange_blocks<2>(rows);
  exchange_blocks<4>(rows);
  if constexpr (kLanes > 8) {
    exchange_blocks<8>(rows);
  }
}

template <int kLanes, typename T>
FASTVAE_INLINE void transpose_square(const T* from, int64_t from_row, T* to, int64_t to_row) {
  typename Lanes<T, kLanes>::Vector rows[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    load_lanes(rows[i], from + i * from_row);
  }
  transpose_lanes<kLanes>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    store_lanes(to + i * to_row, rows[i]);
  }
}

}  // namespace fastvae::cpu
