// Kernels of networks of which every sample owns a copy, trained by Adam: arguments, as in kernels.h, which includes
// this file.
//
// A dense layer's gradient is delta (x) h, never stored. Its weights lie transposed, the `out` numbers of an input side
// by side: where an input is zero, no number of its row enters the output, and the row's gradient is weight decay
// alone. Such a row is left as it is and catches up, with the same arithmetic, when its input is not zero again.
#pragma once

#include <cstdint>

#include "math/adam.h"

namespace fastvae {

// Adam on numbers whose gradient is stored. Index: elements.
template <typename T>
struct AdamUpdate {
  T* value;
  T* mean;
  T* square;
  const T* grad;
  int64_t size;
  math::Adam<T> adam;
  const math::AdamRate<T>* rates;  // of every step
  const int32_t* taken;            // [1] steps
};

// Adam on matrices whose gradient is delta (x) h, which is not stored. CPU only. Index: samples * out.
template <typename T>
struct AdamOuter {
  T* value;  // [samples, out, in]
  T* mean;
  T* square;
  const T* delta;  // [samples, out]
  const T* h;      // [samples, in]
  int64_t out;
  int64_t in;
  math::Adam<T> adam;
  math::AdamRate<T> rate;
};

// The rows of a dense layer: one for each input and, with a bias, a last one whose input is 1.
template <typename T>
struct CopiedRows {
  T* value;  // [samples, in + bias, out]
  T* mean;
  T* square;
  int32_t* seen;  // [samples, in + bias] the steps of Adam that a row has seen
  int64_t samples;
  int64_t in;
  int64_t out;
  int64_t bias;                    // 0 or 1
  const int32_t* taken;            // [1] steps of Adam, where a CUDA graph counts them
  const math::AdamRate<T>* rates;  // of every step
  math::Adam<T> adam;
  FASTVAE_HOST_DEVICE int64_t rows() const { return in + bias; }
  FASTVAE_HOST_DEVICE int64_t steps() const { return *taken; }
};

// The parts of a sample's rows that a GPU's blocks take, whatever the number of samples.
constexpr int64_t kCopiedRowsOfChunk = 64;
FASTVAE_HOST_DEVICE constexpr int64_t copies_chunks(int64_t rows) {
  return (rows + kCopiedRowsOfChunk - 1) / kCopiedRowsOfChunk;
}

// a = W h + b. Index: samples.
template <typename T>
struct CopiesProduct {
  CopiedRows<T> layer;
  const T* h;            // [samples, in]
  T* a;                  // [samples, out]
  T* partial = nullptr;  // CUDA: room for [samples, copies_chunks, out] where there is more than one chunk
};

// One step with the gradient delta (x) h, the step numbered layer.steps(). Index: samples. With `grad_h`, W^T delta of
// the weights before the step; with `next`, W h + b after it, for an h that stays. Never both.
template <typename T>
struct CopiesUpdate {
  CopiedRows<T> layer;
  const T* h;
  const T* delta;        // [samples, out]
  T* grad_h;             // [samples, in] or null
  T* next;               // [samples, out] or null
  bool flat_at_zero;     // grad_h is not read where h is zero, because the activation's slope is zero there
  T* partial = nullptr;  // CUDA, with `next`: as above
};

// All rows up to layer.steps(). Index: samples.
template <typename T>
struct CopiesCatchUp {
  CopiedRows<T> layer;
};

// a = gamma (h - mean) rstd + beta. Index: samples.
template <typename T>
struct CopiesNorm {
  const T* h;       // [samples, positions, channels]
  const T* mean;    // [channels]
  const T* rstd;    // [channels]
  const T* affine;  // [2, samples, channels] gamma, beta
  T* a;
  int64_t samples;
  int64_t positions;
  int64_t channels;
};

// Its gradients, given delta, that of a. Index: samples.
template <typename T>
struct CopiesNormReverse {
  const T* delta;
  const T* h;
  const T* mean;
  const T* rstd;
  const T* affine;
  T* grad_affine;  // [2, samples, channels]
  T* grad_h;       // or null
  int64_t samples;
  int64_t positions;
  int64_t channels;
};

#define FASTVAE_FOR_EACH_COPIES_KERNEL(DECLARE) \
  DECLARE(adam_update, AdamUpdate)              \
  DECLARE(copies_product, CopiesProduct)        \
  DECLARE(copies_update, CopiesUpdate)          \
  DECLARE(copies_catch_up, CopiesCatchUp)       \
  DECLARE(copies_norm, CopiesNorm)              \
  DECLARE(copies_norm_reverse, CopiesNormReverse)

}  // namespace fastvae
