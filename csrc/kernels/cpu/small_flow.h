// The pieces of the small-network flow that forward and backward share: a block's memory, and the two products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../kernels.h"
#include "clones.h"

namespace fastvae::cpu {

// A register of samples side by side. Wider ones were not faster: each multiply-add takes a weight broadcast, and
// broadcasts to 64 bytes come at half the rate [measured].
template <typename T>
struct Register {
  typedef T Vector __attribute__((vector_size(32)));  // NOLINT(modernize-use-using): the attribute is lost there
};
template <typename T>
using Lanes = typename Register<T>::Vector;

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

// The weights of all layers for both directions, in the order in which the products read them: for each tile of output
// features, the bias (forward) or zeros, then a row of the tile for each input feature. Zeros fill the last tile.
template <typename T>
class PackedWeights {
 public:
  static constexpr int kTile = 8;  // sums at a time: as many as hide the latency of a multiply-add

  PackedWeights(const SmallNetwork<T>& network, Carver& memory) {
    for (int l = 0; l < network.depth; ++l) {
      forward[l] = memory.take<T>(numel(network.out[l], network.in[l]));
      reverse[l] = memory.take<T>(numel(network.in[l], network.out[l]));
    }
  }
  FASTVAE_INLINE void fill(const SmallNetwork<T>& network) {
    for (int l = 0; l < network.depth; ++l) {
      pack(network.weight[l], network.in[l], 1, network.bias[l], network.out[l], network.in[l], forward[l]);
      pack(network.weight[l], 1, network.in[l], nullptr, network.in[l], network.out[l], reverse[l]);
    }
  }

  T* forward[kSmallFlowDepth];
  T* reverse[kSmallFlowDepth];

 private:
  static int64_t numel(int64_t rows, int64_t inner) { return (rows + kTile - 1) / kTile * kTile * (inner + 1); }
  FASTVAE_INLINE static void pack(const T* w, int64_t row, int64_t column, const T* bias, int64_t rows, int64_t inner,
                                  T* out) {
    for (int64_t r = 0; r < rows; r += kTile) {
      const int64_t count = rows - r < kTile ? rows - r : kTile;
      std::fill_n(out, (inner + 1) * kTile, T(0));
      for (int64_t i = 0; i < count; ++i) {
        out[i] = bias == nullptr ? T(0) : bias[r + i];
      }
      out += kTile;
      for (int64_t k = 0; k < inner; ++k, out += kTile) {
        for (int64_t i = 0; i < count; ++i) {
          out[i] = w[(r + i) * row + k * column];
        }
      }
    }
  }
};

// out[r] = sum_k w[r, k] in[k] (+ bias[r]), r < rows, k < inner, of packed weights; in and out are vectors of lanes.
// 2 * rows * inner FLOPs a lane.
template <bool kBias, typename T>
FASTVAE_INLINE void small_product(const T* packed, const T* in, T* out, int64_t rows, int64_t inner) {
  using V = Lanes<T>;
  constexpr int kTile = PackedWeights<T>::kTile;
  const V* x = reinterpret_cast<const V*>(in);
  V* y = reinterpret_cast<V*>(out);
  for (int64_t r = 0; r < rows; r += kTile) {
    V sum[kTile];
    for (int i = 0; i < kTile; ++i) {
      sum[i] = V{} + (kBias ? packed[i] : T(0));
    }
    packed += kTile;
    for (int64_t k = 0; k < inner; ++k, packed += kTile) {
      const V value = x[k];
      for (int i = 0; i < kTile; ++i) {
        sum[i] += packed[i] * value;
      }
    }
    for (int i = 0; i < kTile; ++i) {
      if (r + i < rows) {
        y[r + i] = sum[i];
      }
    }
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

}  // namespace fastvae::cpu
