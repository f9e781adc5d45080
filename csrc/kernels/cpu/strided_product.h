// A matrix product for the inside of a convolution: operands are read where they lie, with any strides, so that
// overlapping windows of an image need no copy.
//
//   c[m, n] (+)= sum over runs r and k of  a[r, k, m] * b[r, k, n]       n contiguous in b and c
//
// Blocks of sums stay in registers over all runs and k. 75 to 95 GFLOP/s a core where MKL reaches 95 [measured,
// AVX-512], 35 to 43 where it reaches 58 [AVX2, Zen 3], and no packing, which would cost more than the product at these
// sizes.
#pragma once

#include <cstdint>

#include "clones.h"

namespace fastvae::cpu {

// Whether there are 32 registers of 512 bits, for blocks of 8 x 32 floats; else 6 x 16 fill 12 of AVX2's 16.
#if defined(__x86_64__) && defined(__GNUC__)
inline const bool kWideRegisters = (__builtin_cpu_init(), __builtin_cpu_supports("avx512vl") != 0);
#else
inline constexpr bool kWideRegisters = false;
#endif

template <typename T>
struct StridedProduct {
  const T* a;
  int64_t a_m, a_k, a_run;  // strides
  const T* b;
  int64_t b_k, b_run;
  T* c;
  int64_t c_m;
  int64_t m, n, k, runs;
  bool accumulate;  // add to c instead of overwriting it
};

template <int kRows, int kColumns, typename T>
FASTVAE_INLINE void strided_product_block(const StridedProduct<T>& p, int64_t m, int64_t n) {
  T sums[kRows][kColumns];
  T* c = p.c + m * p.c_m + n;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 1
    for (int j = 0; j < kColumns; ++j) {
      sums[i][j] = p.accumulate ? c[i * p.c_m + j] : T(0);
    }
  }
  for (int64_t run = 0; run < p.runs; ++run) {
    const T* a = p.a + m * p.a_m + run * p.a_run;
    const T* b = p.b + n + run * p.b_run;
    const T* a_high = a + 4 * p.a_m;  // two bases and three offsets for eight rows: all in registers
    for (int64_t k = 0; k < p.k; ++k, a += p.a_k, a_high += p.a_k, b += p.b_k) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const T factor = i < 4 ? a[i * p.a_m] : a_high[(i - 4) * p.a_m];
#pragma GCC unroll 1
        for (int j = 0; j < kColumns; ++j) {
          sums[i][j] += factor * b[j];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 1
    for (int j = 0; j < kColumns; ++j) {
      c[i * p.c_m + j] = sums[i][j];
    }
  }
}

template <int kRows, int kColumns, typename T>
FASTVAE_INLINE void strided_product_rows(const StridedProduct<T>& p, int64_t n) {
  int64_t m = 0;
  for (; m + kRows <= p.m; m += kRows) {
    strided_product_block<kRows, kColumns>(p, m, n);
  }
  if constexpr (kRows > 4) {
    for (; m + 4 <= p.m; m += 4) {
      strided_product_block<4, kColumns>(p, m, n);
    }
  }
  for (; m < p.m; ++m) {
    strided_product_block<1, kColumns>(p, m, n);
  }
}

// From column n on.
template <int kRows, int kColumns, typename T>
FASTVAE_INLINE void strided_product_columns(const StridedProduct<T>& p, int64_t n) {
  for (; n + kColumns <= p.n; n += kColumns) {
    strided_product_rows<kRows, kColumns>(p, n);
  }
  if constexpr (kColumns > 1) {
    strided_product_columns<kRows, (kColumns > 16 ? 16 : kColumns > 4 ? 4 : 1)>(p, n);
  }
}

template <typename T>
FASTVAE_INLINE void strided_product(const StridedProduct<T>& p) {
  constexpr int kFloats = sizeof(T) / sizeof(float);
  kWideRegisters ? strided_product_columns<8 / kFloats, 32>(p, 0) : strided_product_columns<6, 16 / kFloats>(p, 0);
}

}  // namespace fastvae::cpu
