// Transposed convolutions without columns: every output, input gradient and weight gradient is a strided product over
// the windows of one image, padded with zeros so that no window has an edge.
//
//   y       output columns of one residue modulo the stride ("phase") meet the same taps of the kernel
//   h_bar   a stride-wide walk over the output gradient: kernel_width * channels numbers in a row a tap row
//   dW      the same windows against the input, summed over positions
//
// 2 H W kh kw C_in C_out FLOPs a sample each; the padding costs one copy of an image, 1% of it.
#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "clones.h"
#include "strided_product.h"

namespace fastvae::cpu {
namespace {

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

template <typename T>
FASTVAE_INLINE void direct_conv_transpose_template(const DirectConvTranspose<T>& args, int64_t begin, int64_t end) {
  const ConvolutionWindow& w = args.window;
  const int64_t inputs = args.in_channels, outputs = w.channels, tap = inputs * outputs;
  const Reach rows(w.kernel_height, w.stride_height, w.padding_height, w.height, w.big_height);
  const Reach columns(w.kernel_width, w.stride_width, w.padding_width, w.width, w.big_width);
  Padded<T> in(rows.before, columns.before, rows.before + w.height + rows.after,
               columns.before + w.width + columns.after, inputs);
  for (int64_t sample = begin; sample < end; ++sample) {
    in.fill(args.in + sample * w.height * w.width * inputs, w.height, w.width);
    T* image = args.out + sample * w.big_height * w.big_width * outputs;
    for (int64_t y = 0; y < w.big_height; ++y) {
      const Phase row(y % w.stride_height, w.kernel_height, w.stride_height, w.padding_height, w.big_height);
      const T* weight = args.weight + row.first * w.kernel_width * tap;
      for (int64_t p = 0; p < w.stride_width; ++p) {
        const Phase column(p, w.kernel_width, w.stride_width, w.padding_width, w.big_width);
        // Runs go through the tap rows upwards, hence through the input's rows downwards.
        strided_product(StridedProduct<T>{in.at(y / w.stride_height + row.lowest + row.taps - 1, column.lowest), inputs,
                                          1, -in.row_stride(), weight, outputs, w.stride_height * w.kernel_width * tap,
                                          image + (y * w.big_width + p) * outputs, w.stride_width * outputs,
                                          column.outputs, outputs, column.taps * inputs, row.taps, false});
        weight += column.taps * tap;
      }
    }
  }
}

// To few channels the outputs of one phase are too narrow a product: here a row of the input meets all taps at once,
// and what it gives is added to the image while it is in the L1 cache.
template <typename T>
FASTVAE_INLINE void narrow_conv_transpose_template(const NarrowConvTranspose<T>& args, int64_t begin, int64_t end) {
  const ConvolutionWindow& w = args.window;
  const int64_t run = w.kernel_width * w.channels, taps = w.kernel_height * run;
  constexpr int64_t kVector = 16;
  const int64_t padded_taps = (taps + kVector - 1) / kVector * kVector;
  std::vector<T> weight(args.in_channels * padded_taps, T(0));
  for (int64_t c = 0; c < args.in_channels; ++c) {
    std::copy_n(args.weight + c * taps, taps, weight.data() + c * padded_taps);
  }
  std::vector<T> products(w.width * padded_taps);
  Padded<T> out = padded_output<T>(w);
  for (int64_t sample = begin; sample < end; ++sample) {
    std::fill(out.data.begin(), out.data.end(), T(0));
    for (int64_t y = 0; y < w.height; ++y) {
      strided_product(StridedProduct<T>{args.in + (sample * w.height + y) * w.width * args.in_channels,
                                        args.in_channels, 1, 0, weight.data(), padded_taps, 0, products.data(),
                                        padded_taps, w.width, padded_taps, args.in_channels, 1, false});
      for (int64_t i = 0; i < w.kernel_height; ++i) {
        T* row = out.data.data() + (y * w.stride_height + i) * out.row_stride();
        for (int64_t x = 0; x < w.width; ++x) {
          const T* product = products.data() + x * padded_taps + i * run;
          T* target = row + x * w.stride_width * w.channels;
          for (int64_t j = 0; j < run; ++j) {
            target[j] += product[j];
          }
        }
      }
    }
    T* image = args.out + sample * w.big_height * w.big_width * w.channels;
    for (int64_t y = 0; y < w.big_height; ++y) {
      const int64_t columns = y + out.top < out.height ? std::min(w.big_width, out.width - out.left) : 0;
      std::copy_n(out.at(y, 0), columns * w.channels, image + y * w.big_width * w.channels);
      std::fill_n(image + (y * w.big_width + columns) * w.channels, (w.big_width - columns) * w.channels, T(0));
    }
  }
}

template <typename T>
FASTVAE_INLINE void direct_conv_transpose_reverse_template(const DirectConvTransposeReverse<T>& args, int64_t begin,
                                                           int64_t end) {
  const ConvolutionWindow& w = args.window;
  const int64_t inputs = args.in_channels, run = w.kernel_width * w.channels;
  Padded<T> delta = padded_output<T>(w);
  for (int64_t sample = begin; sample < end; ++sample) {
    delta.fill(args.delta + sample * w.big_height * w.big_width * w.channels, w.big_height, w.big_width);
    for (int64_t y = 0; y < w.height; ++y) {
      strided_product(StridedProduct<T>{delta.data.data() + y * w.stride_height * delta.row_stride(),
                                        w.stride_width * w.channels, 1, delta.row_stride(), args.weight, inputs,
                                        run * inputs, args.out + (sample * w.height + y) * w.width * inputs, inputs,
                                        w.width, inputs, run, w.kernel_height, false});
    }
  }
}

template <typename T>
FASTVAE_INLINE void direct_conv_transpose_gradient_template(const DirectConvTransposeGradient<T>& args, int64_t begin,
                                                            int64_t end) {
  const ConvolutionWindow& w = args.window;
  const int64_t inputs = args.in_channels, run = w.kernel_width * w.channels;
  Padded<T> delta = padded_output<T>(w);
  for (int64_t task = begin; task < end; ++task) {
    T* gradient = args.gradient + task * w.kernel_height * run * inputs;
    const int64_t first = args.samples * task / args.tasks, last = args.samples * (task + 1) / args.tasks;
    if (first == last) {
      std::fill_n(gradient, w.kernel_height * run * inputs, T(0));
    }
    for (int64_t sample = first; sample < last; ++sample) {
      delta.fill(args.delta + sample * w.big_height * w.big_width * w.channels, w.big_height, w.big_width);
      for (int64_t i = 0; i < w.kernel_height; ++i) {
        strided_product(StridedProduct<T>{
            delta.data.data() + i * delta.row_stride(), 1, w.stride_width * w.channels,
            w.stride_height * delta.row_stride(), args.in + sample * w.height * w.width * inputs, inputs,
            w.width * inputs, gradient + i * run * inputs, inputs, run, inputs, w.width, w.height, sample > first});
      }
    }
  }
}

}  // namespace

FASTVAE_DEFINE_CPU(direct_conv_transpose, DirectConvTranspose)
FASTVAE_DEFINE_CPU(narrow_conv_transpose, NarrowConvTranspose)
FASTVAE_DEFINE_CPU(direct_conv_transpose_reverse, DirectConvTransposeReverse)
FASTVAE_DEFINE_CPU(direct_conv_transpose_gradient, DirectConvTransposeGradient)

}  // namespace fastvae::cpu
