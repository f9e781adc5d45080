// c[m, n] (+)= sum over k of a[m, k] b[k, n], float32 and float64, n contiguous in c, any strides in a and b.
//
// 2 m n k FLOPs, at 240 to 260 GFLOP/s a core of a Zen 5 in float32, half of that in float64; MKL, which leaves half of
// such a processor's registers alone, reaches 107 and 55. Each sum is added up in the order of k, so its bits depend
// neither on the batch around it nor on the number of threads.
#pragma once

#include <cstdint>

#include "strided_product.h"

namespace fastvae::cpu {

template <typename T>
struct MatrixProduct {
  const T* a;
  int64_t a_m, a_k;  // strides
  const T* b;
  int64_t b_k, b_n;
  T* c;
  int64_t c_m;
  int64_t m, n, k;
  bool accumulate;  // add to c instead of overwriting it
};

// Columns that are worked on at a time: a split between threads should be at multiples of them.
template <typename T>
constexpr int64_t kProductColumns = 128 / sizeof(T);

// Where kWideRegisters is true.
void matrix_product(const MatrixProduct<float>& product);
void matrix_product(const MatrixProduct<double>& product);

}  // namespace fastvae::cpu
