// Of a and b copies are made as pairs (k, k + 1), which is how the instruction takes them: a block of a that the L2
// cache holds meets panels of b that the L1 cache holds.
#include "bfloat16_product.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>

#include "transposition.h"

#define FASTVAE_BFLOAT16 __attribute__((target("arch=x86-64-v4,avx512bf16")))

namespace fastvae::cpu {
namespace {

using Pair = float;  // two bfloat16, the one of the smaller k in the lower half; never computed with

constexpr int64_t kLanes = 16;
constexpr int64_t kPairs = 256;            // of k in a panel or block
constexpr int64_t kRows = 12 * kWideRows;  // of a block of a
constexpr int64_t kRowsWidth = (kRows + kLanes - 1) / kLanes * kLanes;
constexpr int64_t kPanel = kProductColumns<float>;

FASTVAE_BFLOAT16 FASTVAE_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1U << std::max<int64_t>(count, 0)) - 1);
}

// Pairs of as many neighbours as there are of 32, zeros after them.
FASTVAE_BFLOAT16 FASTVAE_INLINE __m512 pairs_along(const float* from, int64_t count) {
  const __m512 low = _mm512_maskz_loadu_ps(first_lanes(count), from);
  const __m512 high =
      count > kLanes ? _mm512_maskz_loadu_ps(first_lanes(count - kLanes), from + kLanes) : _mm512_setzero_ps();
  return (__m512)_mm512_cvtne2ps_pbh(high, low);
}

// Pairs of two rows, column by column.
FASTVAE_BFLOAT16 FASTVAE_INLINE __m512 pairs_across(__m512 first, __m512 second) {
  const auto side_by_side = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (__m512)_mm512_permutexvar_epi16(order, side_by_side);
}

// to[p, j] = (from[2 p, j], from[2 p + 1, j]), in whole vectors of j; neighbours in j lie side by side, or in any way.
FASTVAE_BFLOAT16 FASTVAE_INLINE void pack_rows(const float* from, int64_t along_k, int64_t along_j, int64_t k,
                                               int64_t size, Pair* to, int64_t width) {
  for (int64_t p = 0; 2 * p < k; ++p) {
    for (int64_t j = 0; j < size; j += kLanes) {
      __m512 rows[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t i = 0; i < 2 && 2 * p + i < k; ++i) {
        const float* row = from + (2 * p + i) * along_k + j * along_j;
        if (along_j == 1) {
          rows[i] = _mm512_maskz_loadu_ps(first_lanes(size - j), row);
        } else {
          alignas(64) float lanes[kLanes] = {};
          for (int64_t lane = 0; lane < std::min(kLanes, size - j); ++lane) {
            lanes[lane] = row[lane * along_j];
          }
          rows[i] = _mm512_load_ps(lanes);
        }
      }
      _mm512_storeu_ps(to + p * width + j, pairs_across(rows[0], rows[1]));
    }
  }
}

// The same where neighbours in k lie side by side.
FASTVAE_BFLOAT16 FASTVAE_INLINE void pack_columns(const float* from, int64_t along_j, int64_t k, int64_t size, Pair* to,
                                                  int64_t width) {
  for (int64_t j = 0; j < size; j += kLanes) {
    for (int64_t first = 0; first < k; first += 2 * kLanes) {
      Lanes<float, kLanes>::Vector square[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = j + i < size
                        ? (Lanes<float, kLanes>::Vector)pairs_along(from + (j + i) * along_j + first, k - first)
                        : Lanes<float, kLanes>::Vector{};
      }
      transpose_lanes<kLanes>(square);
      const int64_t count = std::min(kLanes, (k - first + 1) / 2);
      for (int64_t i = 0; i < count; ++i) {
        store_lanes(to + (first / 2 + i) * width + j, square[i]);
      }
    }
  }
}

FASTVAE_BFLOAT16 FASTVAE_INLINE void pack(const float* from, int64_t along_k, int64_t along_j, int64_t k, int64_t size,
                                          Pair* to, int64_t width) {
  along_k == 1 ? pack_columns(from, along_j, k, size, to, width)
               : pack_rows(from, along_k, along_j, k, size, to, width);
}

struct Block {
  const Pair* a;  // [pairs, kRowsWidth]
  const Pair* b;  // [pairs, kPanel]
  float* c;
  int64_t c_m, pairs;
  __mmask16 columns[2];
  bool accumulate;
};

template <int kCount, int kVectors>
FASTVAE_BFLOAT16 FASTVAE_INLINE void multiply(const Block& block) {
  __m512 sums[kCount][kVectors];
#pragma GCC unroll 14
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = block.accumulate ? _mm512_maskz_loadu_ps(block.columns[j], block.c + i * block.c_m + j * kLanes)
                                    : _mm512_setzero_ps();
    }
  }
  const Pair *a = block.a, *b = block.b;
  for (int64_t p = 0; p < block.pairs; ++p, a += kRowsWidth, b += kPanel) {
    __m512 b_row[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      b_row[j] = _mm512_loadu_ps(b + j * kLanes);
    }
#pragma GCC unroll 14
    for (int i = 0; i < kCount; ++i) {
      const __m512 factor = _mm512_set1_ps(a[i]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)factor, (__m512bh)b_row[j]);
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      _mm512_mask_storeu_ps(block.c + i * block.c_m + j * kLanes, block.columns[j], sums[i][j]);
    }
  }
}

template <int kCount>
FASTVAE_BFLOAT16 FASTVAE_INLINE void multiply_rows(const Block& block, int64_t rows) {
  if constexpr (kCount > 1) {
    if (rows < kCount) {
      return multiply_rows<kCount - 1>(block, rows);
    }
  }
  block.columns[1] != 0 ? multiply<kCount, 2>(block) : multiply<kCount, 1>(block);
}

}  // namespace

FASTVAE_BFLOAT16 void bfloat16_product(const MatrixProduct<float>& p) {
  alignas(64) Pair a[kPairs * kRowsWidth];
  alignas(64) Pair b[kPairs * kPanel];
  for (int64_t m = 0; m < p.m; m += kRows) {
    const int64_t rows = std::min(kRows, p.m - m);
    for (int64_t k = 0; k < p.k; k += 2 * kPairs) {
      const int64_t depth = std::min(2 * kPairs, p.k - k);
      pack(p.a + m * p.a_m + k * p.a_k, p.a_k, p.a_m, depth, rows, a, kRowsWidth);
      for (int64_t n = 0; n < p.n; n += kPanel) {
        const int64_t columns = std::min(kPanel, p.n - n);
        pack(p.b + k * p.b_k + n * p.b_n, p.b_k, p.b_n, depth, columns, b, kPanel);
        // Blocks of nearly the same number of rows: a last block of one row would wait for each of its sums.
        int64_t row = 0;
        for (int64_t blocks = (rows + kWideRows - 1) / kWideRows; blocks > 0; --blocks) {
          const int64_t count = (rows - row + blocks - 1) / blocks;
          multiply_rows<kWideRows>({a + row,
                                    b,
                                    p.c + (m + row) * p.c_m + n,
                                    p.c_m,
                                    (depth + 1) / 2,
                                    {first_lanes(columns), first_lanes(columns - kLanes)},
                                    p.accumulate || k > 0},
                                   count);
          row += count;
        }
      }
    }
  }
}

}  // namespace fastvae::cpu

#else

namespace fastvae::cpu {

void bfloat16_product(const MatrixProduct<float>& product) { matrix_product(product); }

}  // namespace fastvae::cpu

#endif
