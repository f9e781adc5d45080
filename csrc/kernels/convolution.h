// Kernels of convolutions: arguments, as in kernels.h, which includes this file.
#pragma once

#include <cstdint>

#include "math/likelihoods.h"

namespace fastvae {

// How the kernel of a convolution walks over the larger of its two images.
struct ConvolutionWindow {
  int64_t channels;               // of the larger image
  int64_t height, width;          // of the smaller image
  int64_t big_height, big_width;  // of the larger one
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
};

// columns [samples, height, width, kernel_height, kernel_width, channels]: the patch of the larger image (zero outside
// it) that each position of the smaller one meets. Index: samples.
template <typename T>
struct Unfold {
  const T* image;
  T* columns;
  ConvolutionWindow window;
  int64_t samples;
};

// The adjoint of Unfold: image = sum of the patches. Index: samples.
template <typename T>
struct Fold {
  const T* columns;
  T* image;
  ConvolutionWindow window;
  int64_t samples;
};

// A transposed convolution to few channels, [samples, height, width, in_channels] to [samples, big_height, big_width,
// channels], without bias and dilation. CPU only. Index: samples.
template <typename T>
struct NarrowConvTranspose {
  const T* in;
  const T* weight;  // [in_channels, kernel_height, kernel_width, channels]
  T* out;
  int64_t in_channels;
  ConvolutionWindow window;
};

// A transposed convolution without bias and without dilation: in [samples, height, width, in_channels] to out [samples,
// big_height, big_width, channels]. CPU only. Index: samples.
template <typename T>
struct DirectConvTranspose {
  const T* in;
  const T* weight;  // [kernel_height, by phase: taps in descending order, in_channels, channels]
  T* out;
  int64_t in_channels;
  ConvolutionWindow window;
};

// log p(x | a) [samples] of a = its result + bias, without writing a. CPU only. Index: samples.
template <typename T>
struct ConvTransposeLogProb {
  DirectConvTranspose<T> layer;  // its `out` is not used
  const T* bias;                 // [channels] or null
  const T* x;                    // [samples, big_height, big_width, channels or channels / classes]
  T* log_prob;
  LikelihoodSpec likelihood;
};

// The transpose of DirectConvTranspose, delta -> out [samples, height, width, in_channels]. CPU only. Index: samples.
template <typename T>
struct DirectConvTransposeReverse {
  const T* delta;
  const T* weight;  // [kernel_height, kernel_width, channels, in_channels]
  T* out;
  int64_t in_channels;
  ConvolutionWindow window;
};

// gradient [tasks, kernel_height, kernel_width, channels, in_channels]: the sum over each task's share of the samples
// of delta (x) in. CPU only. Index: tasks.
template <typename T>
struct DirectConvTransposeGradient {
  const T* delta;
  const T* in;
  T* gradient;
  int64_t in_channels;
  int64_t samples;
  int64_t tasks;
  ConvolutionWindow window;
};

}  // namespace fastvae
