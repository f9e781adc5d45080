// Convolutions of which every sample owns the weights: arguments, as in kernels.h, which includes this file.
#pragma once

#include <cstdint>

namespace fastvae {

constexpr int kCopiedAxes = 3;

// How a kernel walks over the larger of its two images, in one to three dimensions (the first ones are 1 where there
// are fewer).
struct CopiedWindow {
  int64_t channels;  // of the larger image
  int64_t filters;   // of the smaller image
  int64_t groups;
  int64_t big[kCopiedAxes];
  int64_t small[kCopiedAxes];
  int64_t kernel[kCopiedAxes];
  int64_t stride[kCopiedAxes];
  int64_t padding[kCopiedAxes];
  int64_t dilation[kCopiedAxes];

  static int64_t product(const int64_t (&sizes)[kCopiedAxes]) { return sizes[0] * sizes[1] * sizes[2]; }
  int64_t taps() const { return product(kernel); }
  int64_t positions() const { return product(small); }
  int64_t big_positions() const { return product(big); }
};

// The three products of a convolution, of which each gives one of big, small and weight from the other two:
//   small = columns(big) weight + bias,   big = columns^T(small weight^T) + bias,   weight = columns(big)^T small
// CPU only. Index: samples.
template <typename T>
struct CopiedConvolution {
  T* big;         // [samples, images, *big, channels]
  T* small;       // [samples, images, *small, filters]
  T* weight;      // [samples, taps, channels / groups, filters]
  const T* bias;  // [samples, filters or channels] or null
  int64_t images;
  CopiedWindow window;
};

}  // namespace fastvae
