// The pieces of the small-network flow that forward and backward share: a block's memory, and the product of a layer.
// The parts of a block's points are matrices [samples, features].
#pragma once

#include <cstdint>
#include <memory>

#include "../kernels.h"
#include "strided_product.h"

namespace fastvae::cpu {

// Hands out parts of a block of memory, from the start of a cache line on; without a block it only counts.
class Carver {
 public:
  explicit Carver(unsigned char* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

// Memory that a thread keeps from call to call, for one user at a time: fresh pages cost as much as the arithmetic on
// them. Not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    const auto count = static_cast<size_t>(bytes / 64 + 1);
    static thread_local std::unique_ptr<Line[]> kept;
    static thread_local size_t kept_count = 0;
    if (bytes > kKept) {
      own_ = std::make_unique_for_overwrite<Line[]>(count);
    } else if (count > kept_count) {
      kept = std::make_unique_for_overwrite<Line[]>(count);
      kept_count = count;
    }
    data_ = (own_ == nullptr ? kept : own_)[0].bytes;
  }
  unsigned char* data() { return data_; }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  static constexpr int64_t kKept = int64_t{1} << 22;
  std::unique_ptr<Line[]> own_;
  unsigned char* data_ = nullptr;
};

// The weights as the products read them, [input, output] of either direction: W of the reverse sweep as it is, and a
// transposed copy for the forward one.
template <typename T>
class SmallWeights {
 public:
  SmallWeights(const SmallNetwork<T>& network, Carver& memory) {
    for (int l = 0; l < network.depth; ++l) {
      forward_[l] = memory.take<T>(network.in[l] * network.out[l]);
    }
  }
  FASTVAE_INLINE void fill(const SmallNetwork<T>& network) {
    for (int l = 0; l < network.depth; ++l) {
      const int64_t rows = network.out[l], columns = network.in[l];
      constexpr int64_t kTile = 16;  // lines of either side that are open at a time
      for (int64_t first = 0; first < rows; first += kTile) {
        const int64_t end = first + kTile < rows ? first + kTile : rows;
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t r = first; r < end; ++r) {
            forward_[l][c * rows + r] = network.weight[l][r * columns + c];
          }
        }
      }
    }
  }

  // out [samples, out of l] = in [samples, in of l] W^T: 2 * in * out FLOPs a sample, as in reverse().
  FASTVAE_INLINE void forward(const SmallNetwork<T>& network, int l, const T* in, int64_t samples, T* out) const {
    product(forward_[l], in, network.in[l], samples, out, network.out[l]);
  }
  // out [samples, in of l] = in [samples, out of l] W.
  FASTVAE_INLINE void reverse(const SmallNetwork<T>& network, int l, const T* in, int64_t samples, T* out) const {
    product(network.weight[l], in, network.out[l], samples, out, network.in[l]);
  }

 private:
  FASTVAE_INLINE static void product(const T* weight, const T* in, int64_t inner, int64_t samples, T* out,
                                     int64_t features) {
    strided_product(
        StridedProduct<T>{in, inner, 1, 0, weight, features, 0, out, features, samples, features, inner, 1, false});
  }

  T* forward_[kSmallFlowDepth];
};

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
  constexpr int kBlock = kSmallFlowLanes<T>;
  SmallPoint<T> point{};
  point.z = tape + at.z * kBlock;
  point.rho = tape + at.rho * kBlock;
  point.force = tape + at.force * kBlock;
  for (int l = 0; l < depth; ++l) {
    point.delta[l] = tape + at.delta[l] * kBlock;
    point.h[l] = tape + at.h[l] * kBlock;
    point.slope[l] = tape + at.slope[l] * kBlock;
    point.error[l] = tape + at.error[l] * kBlock;
  }
  return point;
}

}  // namespace fastvae::cpu
