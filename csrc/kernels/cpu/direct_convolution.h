// The geometry of a transposed convolution without columns, and one row of its outputs.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "clones.h"
#include "strided_product.h"

namespace fastvae::cpu {

FASTVAE_INLINE int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// A copy of [height, width, channels] with zeros around it.
template <typename T>
struct Padded {
  int64_t top, left, height, width, channels;  // of the copy
  std::vector<T> data;

  Padded(int64_t top_rows, int64_t left_columns, int64_t all_rows, int64_t all_columns, int64_t image_channels)
      : top(top_rows),
        left(left_columns),
        height(all_rows),
        width(all_columns),
        channels(image_channels),
        data(height * width * channels, T(0)) {}

  FASTVAE_INLINE void fill(const T* image, int64_t rows, int64_t columns) {
    for (int64_t y = 0; y < std::min(rows, height - top); ++y) {
      std::copy_n(image + y * columns * channels, std::min(columns, width - left) * channels,
                  data.data() + ((y + top) * width + left) * channels);
    }
  }
  int64_t row_stride() const { return width * channels; }
  // Position (y, x) of the image.
  const T* at(int64_t y, int64_t x) const { return data.data() + ((y + top) * width + x + left) * channels; }
};

// Along one axis: outputs phase + stride * q read inputs q + lowest ... q + lowest + taps - 1, in the order of
// descending taps of the kernel, the last of which is `first`.
struct Phase {
  int64_t first, taps, lowest, outputs;
  FASTVAE_INLINE Phase(int64_t phase, int64_t kernel, int64_t stride, int64_t padding, int64_t size)
      : first((phase + padding) % stride),
        taps(kernel > first ? (kernel - first + stride - 1) / stride : 0),
        lowest(floor_divide(phase + padding - (first + (taps - 1) * stride), stride)),
        outputs(size > phase ? (size - phase + stride - 1) / stride : 0) {}
};

// How far the windows of all phases reach beyond an input of `size`.
struct Reach {
  int64_t before = 0, after = 0;
  FASTVAE_INLINE Reach(int64_t kernel, int64_t stride, int64_t padding, int64_t size, int64_t outputs) {
    for (int64_t p = 0; p < stride; ++p) {
      const Phase phase(p, kernel, stride, padding, outputs);
      if (phase.taps > 0 && phase.outputs > 0) {
        before = std::max(before, -phase.lowest);
        after = std::max(after, phase.outputs + phase.lowest + phase.taps - 1 - size);
      }
    }
  }
};

template <typename T>
FASTVAE_INLINE Padded<T> padded_output(const ConvolutionWindow& w) {
  return {w.padding_height, w.padding_width, (w.height - 1) * w.stride_height + w.kernel_height,
          (w.width - 1) * w.stride_width + w.kernel_width, w.channels};
}

// One phase of a row of the outputs at a time, from a padded copy of a sample's input.
template <typename T>
class PhaseRows {
 public:
  FASTVAE_INLINE explicit PhaseRows(const DirectConvTranspose<T>& args)
      : args_(args),
        rows_(args.window.kernel_height, args.window.stride_height, args.window.padding_height, args.window.height,
              args.window.big_height),
        columns_(args.window.kernel_width, args.window.stride_width, args.window.padding_width, args.window.width,
                 args.window.big_width),
        in_(rows_.before, columns_.before, rows_.before + args.window.height + rows_.after,
            columns_.before + args.window.width + columns_.after, args.in_channels) {}

  FASTVAE_INLINE void load(int64_t sample) {
    const ConvolutionWindow& w = args_.window;
    in_.fill(args_.in + sample * w.height * w.width * args_.in_channels, w.height, w.width);
  }

  // From the inputs of a row to those of the next one of its phase.
  FASTVAE_INLINE int64_t row_stride() const { return in_.row_stride(); }

  // The product that gives outputs phase, phase + stride, ... of row y of the loaded sample. It lacks the place of its
  // result, `c` and `c_m`.
  FASTVAE_INLINE StridedProduct<T> product(int64_t y, int64_t phase) const {
    const ConvolutionWindow& w = args_.window;
    const int64_t inputs = args_.in_channels, outputs = w.channels, tap = inputs * outputs;
    const Phase row(y % w.stride_height, w.kernel_height, w.stride_height, w.padding_height, w.big_height);
    const auto column_of = [&](int64_t p) FASTVAE_LAMBDA_INLINE {
      return Phase(p, w.kernel_width, w.stride_width, w.padding_width, w.big_width);
    };
    const T* weight = args_.weight + row.first * w.kernel_width * tap;
    for (int64_t before = 0; before < phase; ++before) {
      weight += column_of(before).taps * tap;
    }
    const Phase column = column_of(phase);
    // Runs go through the tap rows upwards, hence through the input's rows downwards.
    return {in_.at(y / w.stride_height + row.lowest + row.taps - 1, column.lowest),
            inputs,
            1,
            -in_.row_stride(),
            weight,
            outputs,
            w.stride_height * w.kernel_width * tap,
            nullptr,
            0,
            column.outputs,
            outputs,
            column.taps * inputs,
            row.taps,
            false};
  }

 private:
  const DirectConvTranspose<T>& args_;
  Reach rows_, columns_;
  Padded<T> in_;
};

}  // namespace fastvae::cpu
