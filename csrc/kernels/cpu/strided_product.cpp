// Compiled once for all that call it: a call costs nothing beside a product, and inlined into every kernel the blocks
// took minutes to compile.
#include "strided_product.h"

#include <algorithm>

#include "lanes.h"

namespace fastvae::cpu {
namespace {

template <int kRows, int kVectors, int kLanes, typename T>
FASTVAE_INLINE void block(const StridedProduct<T>& p, int64_t m, int64_t n) {
  using Vector = typename Lanes<T, kLanes>::Vector;
  Vector sums[kRows][kVectors], b_row[kVectors];
  T* c = p.c + m * p.c_m + n;
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = Vector{};
      if (p.accumulate) {
        load_lanes(sums[i][j], c + i * p.c_m + j * kLanes);
      }
    }
  }
  for (int64_t run = 0; run < p.runs; ++run) {
    // Four bases and three offsets for fourteen rows: all in registers.
    const T* a = p.a + m * p.a_m + run * p.a_run;
    const T *a_4 = a + 4 * p.a_m, *a_8 = a + 8 * p.a_m, *a_12 = a + 12 * p.a_m;
    const T* b = p.b + n + run * p.b_run;
    for (int64_t k = 0; k < p.k; ++k, a += p.a_k, a_4 += p.a_k, a_8 += p.a_k, a_12 += p.a_k, b += p.b_k) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        load_lanes(b_row[j], b + j * kLanes);
      }
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i) {
        const T* base = i < 4 ? a : i < 8 ? a_4 : i < 12 ? a_8 : a_12;
        const T factor = base[(i % 4) * p.a_m];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          sums[i][j] += factor * b_row[j];
        }
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      store_lanes(c + i * p.c_m + j * kLanes, sums[i][j]);
    }
  }
}

// The block of as many rows as there are.
template <int kRows, int kVectors, int kLanes, typename T>
FASTVAE_INLINE void block_of(int64_t rows, const StridedProduct<T>& p, int64_t m, int64_t n) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return block_of<kRows - 1, kVectors, kLanes>(rows, p, m, n);
    }
  }
  block<kRows, kVectors, kLanes>(p, m, n);
}

// Blocks of nearly the same number of rows: a last block of one row would wait for each of its sums.
template <int kRows, int kVectors, int kLanes, typename T>
FASTVAE_INLINE void columns_from(const StridedProduct<T>& p, int64_t n) {
  int64_t m = 0;
  for (int64_t blocks = (p.m + kRows - 1) / kRows; blocks > 0; --blocks) {
    const int64_t rows = (p.m - m + blocks - 1) / blocks;
    block_of<kRows, kVectors, kLanes>(rows, p, m, n);
    m += rows;
  }
}

// From column n on, with fewer lanes for what is left over.
template <int kRows, int kVectors, int kLanes, typename T>
FASTVAE_INLINE void product_from(const StridedProduct<T>& p, int64_t n) {
  constexpr int64_t kColumns = int64_t{kVectors} * kLanes;
  for (; n + kColumns <= p.n; n += kColumns) {
    columns_from<kRows, kVectors, kLanes>(p, n);
  }
  if constexpr (kVectors > 1) {
    product_from<kRows, 1, kLanes>(p, n);
  } else if constexpr (kLanes > 1) {
    product_from<std::min(kRows, 6), 1, (kLanes > 4 ? 4 : 1)>(p, n);
  }
}

FASTVAE_WIDE void wide_product(const StridedProduct<float>& product) { product_from<kWideRows, 2, 16>(product, 0); }

FASTVAE_WIDE void wide_product(const StridedProduct<double>& product) { product_from<kWideRows, 2, 8>(product, 0); }

FASTVAE_CLONES void narrow_product(const StridedProduct<float>& product) { product_from<6, 1, 16>(product, 0); }

FASTVAE_CLONES void narrow_product(const StridedProduct<double>& product) { product_from<6, 1, 8>(product, 0); }

}  // namespace

void strided_product(const StridedProduct<float>& product, bool wide) {
  wide ? wide_product(product) : narrow_product(product);
}

void strided_product(const StridedProduct<double>& product, bool wide) {
  wide ? wide_product(product) : narrow_product(product);
}

}  // namespace fastvae::cpu
