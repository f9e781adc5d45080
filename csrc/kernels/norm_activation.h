// A normalisation and the activation behind it, as one layer: arguments of its four rules.
#pragma once

#include <cstdint>

#include "math/activations.h"

namespace fastvae {

// How the numbers of a norm are found.
enum class Statistics : int {
  kNone = 0,    // no norm: mean 0, s 1
  kGiven,       // one mean and s a channel (BatchNorm in eval mode), which depend on no x
  kOfGroups,    // mean and s of each group of a sample's channels
  kRootSquare,  // the same without the mean: s = (mean of x^2 + eps)^-1/2
};

// x [x_samples, channels, positions], with the channels last or the positions. Sample i of the other arrays belongs to
// sample i % x_samples of x, so that tangents along several latents share one x. Index: samples.
//
// Cost an element: forward reads x three times (twice from a cache) and writes 1; reverse reads 2 twice and writes 1;
// tangent likewise; adjoint reads 4 in three passes, two of them from a cache, and writes 1; one value of the
// activation and its derivatives in each.
template <typename T>
struct NormActivation {
  const T* x;
  const T* dy;      // reverse, adjoint; may be null in the latter: zero
  const T* dy_dot;  // adjoint; may be null: zero
  const T* x_dot;   // tangent, adjoint
  const T* gain;    // [affine_samples, channels] or null
  const T* bias;    // [affine_samples, channels] or null
  T* mean;          // [x_samples, groups], or [channels] where they are given; null without a norm
  T* s;
  T* out;     // y, dx or ydot
  T* d_gain;  // [samples, channels] or null
  T* d_bias;  // [samples, channels] or null
  int64_t samples;
  int64_t x_samples;
  int64_t affine_samples;  // gains and biases: each of as many samples of x in a row
  int64_t channels;
  int64_t positions;
  int64_t groups;
  double eps;
  bool channels_last;
  Statistics statistics;
  ActivationSpec activation;

  // Where the gain and bias of a sample of x begin.
  int64_t affine_of(int64_t x_sample) const { return x_sample * affine_samples / x_samples * channels; }
};

}  // namespace fastvae
