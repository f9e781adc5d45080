// Compiled once for all that call it: a call costs nothing beside a product, and inlined into every kernel the blocks
// took minutes to compile.
#include "strided_product.h"

namespace fastvae::cpu {
namespace {

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

}  // namespace

FASTVAE_CLONES void strided_product(const StridedProduct<float>& product, bool wide) {
  wide ? strided_product_columns<8, 32>(product, 0) : strided_product_columns<6, 16>(product, 0);
}

FASTVAE_CLONES void strided_product(const StridedProduct<double>& product, bool wide) {
  wide ? strided_product_columns<4, 32>(product, 0) : strided_product_columns<6, 8>(product, 0);
}

}  // namespace fastvae::cpu
