// The pieces of the small-network flow that forward and backward share: a block's memory, and the two products.
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "clones.h"

namespace fastvae::cpu {

template <typename T>
using Lanes __attribute__((vector_size(32))) = T;

// out[r] = sum_k w[r * row + k * column] in[k] (+ bias[r]), r < rows, k < inner; in and out are vectors of lanes.
// Eight sums at a time in registers: 2 * rows * inner FLOPs a lane, one broadcast load a multiply-add.
template <typename T>
FASTVAE_INLINE void small_product(const T* w, int64_t row, int64_t column, const T* bias, const T* in, T* out,
                                  int64_t rows, int64_t inner) {
  using V = Lanes<T>;
  const V* x = reinterpret_cast<const V*>(in);
  V* y = reinterpret_cast<V*>(out);
  constexpr int kRows = 8;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    V sum[kRows];
    for (int i = 0; i < kRows; ++i) {
      sum[i] = V{} + (bias == nullptr ? T(0) : bias[r + i]);
    }
    const T* base = w + r * row;
    for (int64_t k = 0; k < inner; ++k) {
      const V value = x[k];
      for (int i = 0; i < kRows; ++i) {
        sum[i] += base[i * row + k * column] * value;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      y[r + i] = sum[i];
    }
  }
  for (; r < rows; ++r) {
    V sum = V{} + (bias == nullptr ? T(0) : bias[r]);
    for (int64_t k = 0; k < inner; ++k) {
      sum += w[r * row + k * column] * x[k];
    }
    y[r] = sum;
  }
}

// SmallPointLayout as pointers into a tape.
template <typename T>
struct SmallPoint {
  T* z;
  T* rho;
  T* force;
  T* h[kSmallFlowDepth];
  T* delta[kSmallFlowDepth];
  T* slope[kSmallFlowDepth];
  T* error[kSmallFlowDepth];
};

template <typename T>
FASTVAE_INLINE SmallPoint<T> small_point(const SmallPointLayout& at, int depth, T* tape) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  SmallPoint<T> point{};
  point.z = tape + at.z * kLanes;
  point.rho = tape + at.rho * kLanes;
  point.force = tape + at.force * kLanes;
  for (int l = 0; l < depth; ++l) {
    point.delta[l] = tape + at.delta[l] * kLanes;
    point.h[l] = tape + at.h[l] * kLanes;
    point.slope[l] = tape + at.slope[l] * kLanes;
    point.error[l] = tape + at.error[l] * kLanes;
  }
  return point;
}

// [samples, features] rows of a block to [feature, lane]. Lanes beyond the last sample repeat it: they are swept like
// the others, and a made-up sample could diverge where none of the real ones does.
template <typename T>
FASTVAE_INLINE void load_block(const T* rows, int64_t first, int64_t samples, int64_t features, T* block) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t sample = first + lane < samples ? first + lane : samples - 1;
    for (int64_t j = 0; j < features; ++j) {
      block[j * kLanes + lane] = rows[sample * features + j];
    }
  }
}

// The same for cotangents, of which the lanes beyond the last sample have none; rows may be null.
template <typename T>
FASTVAE_INLINE void load_cotangents(const T* rows, int64_t first, int64_t samples, int64_t features, T* block) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool there = rows != nullptr && first + lane < samples;
    for (int64_t j = 0; j < features; ++j) {
      block[j * kLanes + lane] = there ? rows[(first + lane) * features + j] : T(0);
    }
  }
}

// The way back, without the lanes beyond the last sample.
template <typename T>
FASTVAE_INLINE void store_block(const T* block, int64_t first, int64_t samples, int64_t features, T* rows) {
  constexpr int kLanes = kSmallFlowLanes<T>;
  for (int lane = 0; lane < kLanes && first + lane < samples; ++lane) {
    for (int64_t j = 0; j < features; ++j) {
      rows[(first + lane) * features + j] = block[j * kLanes + lane];
    }
  }
}

// Vectors of lanes, aligned for whole-vector access.
template <typename T>
class LaneBuffer {
 public:
  explicit LaneBuffer(int64_t features) : data_(new Lanes<T>[static_cast<size_t>(features)]()) {}
  ~LaneBuffer() { delete[] data_; }
  LaneBuffer(const LaneBuffer&) = delete;
  LaneBuffer& operator=(const LaneBuffer&) = delete;
  T* data() { return reinterpret_cast<T*>(data_); }

 private:
  Lanes<T>* data_;
};

}  // namespace fastvae::cpu
