// Panels of b, as wide as a block of strided_product, meet blocks of a that the L2 cache holds. A panel is copied where
// it does not lie in rows, or where many rows of a read it anew.
#include "matrix_product.h"

#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "transposition.h"

namespace fastvae::cpu {
namespace {

constexpr int64_t kDepth = 256;  // of a panel: with 32 floats a row two thirds of the L1 cache
constexpr int64_t kRows = 32 * kWideRows;
// Few rows read all of b for little work: it comes from memory in long rows.
constexpr int64_t kShallowDepth = 16;
constexpr int64_t kCacheBytes = int64_t{1} << 21;
constexpr int64_t kFewRows = 128;

// panel[k, n] = b[k, n], zero in the columns that b does not have.
template <int kLanes, typename T>
FASTVAE_INLINE void copy_panel(const T* b, int64_t b_k, int64_t b_n, int64_t depth, int64_t columns, int64_t width,
                               T* panel) {
  int64_t n = 0;
  if (b_n == 1) {
    for (; n + kLanes <= columns; n += kLanes) {
      for (int64_t k = 0; k < depth; ++k) {
        std::memcpy(panel + k * width + n, b + k * b_k + n, kLanes * sizeof(T));
      }
    }
  } else if (b_k == 1) {
    for (; n + kLanes <= columns; n += kLanes) {
      int64_t k = 0;
      for (; k + kLanes <= depth; k += kLanes) {
        transpose_square<kLanes>(b + n * b_n + k, b_n, panel + k * width + n, width);
      }
      for (; k < depth; ++k) {
        for (int64_t j = n; j < n + kLanes; ++j) {
          panel[k * width + j] = b[j * b_n + k];
        }
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = n; j < width; ++j) {
      panel[k * width + j] = j < columns ? b[k * b_k + j * b_n] : T(0);
    }
  }
}

// A product of whole vectors into an array, and from there what c has of it.
template <typename T>
FASTVAE_INLINE void edge_product(const StridedProduct<T>& product, int64_t columns) {
  T sums[kWideRows * kProductColumns<T>];
  for (int64_t first = 0; first < product.m; first += kWideRows) {
    StridedProduct<T> part = product;
    part.m = std::min<int64_t>(kWideRows, product.m - first);
    part.a += first * product.a_m;
    part.c = sums;
    part.c_m = product.n;
    T* c = product.c + first * product.c_m;
    for (int64_t i = 0; i < part.m && product.accumulate; ++i) {
      std::copy_n(c + i * product.c_m, columns, sums + i * product.n);
    }
    strided_product(part, /*wide=*/true);
    for (int64_t i = 0; i < part.m; ++i) {
      std::copy_n(sums + i * product.n, columns, c + i * product.c_m);
    }
  }
}

template <typename T>
FASTVAE_INLINE void matrix_product_template(const MatrixProduct<T>& p) {
  constexpr int64_t kPanel = kProductColumns<T>;
  constexpr int kLanes = kPanel / 2;
  alignas(64) T panel[kDepth * kPanel];
  const bool fits = p.k * p.n * static_cast<int64_t>(sizeof(T)) <= kCacheBytes;
  const bool in_rows = p.b_n == 1 && (fits || p.m <= kFewRows);
  const int64_t most = in_rows && !fits && p.m <= kWideRows ? kShallowDepth : kDepth;
  for (int64_t m = 0; m < p.m; m += kRows) {
    for (int64_t k = 0; k < p.k; k += most) {
      const int64_t depth = std::min(most, p.k - k);
      for (int64_t n = 0; n < p.n; n += kPanel) {
        const int64_t columns = std::min(kPanel, p.n - n), width = columns > kLanes ? kPanel : kLanes;
        StridedProduct<T> part{p.a + m * p.a_m + k * p.a_k,
                               p.a_m,
                               p.a_k,
                               0,
                               p.b + k * p.b_k + n * p.b_n,
                               p.b_k,
                               0,
                               p.c + m * p.c_m + n,
                               p.c_m,
                               std::min(kRows, p.m - m),
                               width,
                               depth,
                               1,
                               p.accumulate || k > 0};
        if (!in_rows || columns < width) {
          copy_panel<kLanes>(part.b, p.b_k, p.b_n, depth, columns, width, panel);
          part.b = panel;
          part.b_k = width;
        }
        columns == width ? strided_product(part, /*wide=*/true) : edge_product(part, columns);
      }
    }
  }
}

}  // namespace

FASTVAE_WIDE void matrix_product(const MatrixProduct<float>& product) { matrix_product_template(product); }

FASTVAE_WIDE void matrix_product(const MatrixProduct<double>& product) { matrix_product_template(product); }

}  // namespace fastvae::cpu
