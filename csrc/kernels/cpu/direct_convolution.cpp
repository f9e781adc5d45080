// Transposed convolutions without columns: every output, input gradient and weight gradient is a strided product over
// the windows of one image, padded with zeros so that no window has an edge.
//
//   y       output columns of one residue modulo the stride ("phase") meet the same taps of the kernel
//   h_bar   a stride-wide walk over the output gradient: kernel_width * channels numbers in a row a tap row
//   dW      the same windows against the input, summed over positions
//
// 2 H W kh kw C_in C_out FLOPs a sample each; the padding costs one copy of an image, 1% of it.
#include "direct_convolution.h"

namespace fastvae::cpu {
namespace {

template <typename T>
FASTVAE_INLINE void direct_conv_transpose_template(const DirectConvTranspose<T>& args, int64_t begin, int64_t end) {
  const ConvolutionWindow& w = args.window;
  PhaseRows<T> phases(args);
  for (int64_t sample = begin; sample < end; ++sample) {
    phases.load(sample);
    T* image = args.out + sample * w.big_height * w.big_width * w.channels;
    for (int64_t top = 0; top < std::min(w.stride_height, w.big_height); ++top) {
      for (int64_t phase = 0; phase < w.stride_width; ++phase) {
        StridedProduct<T> product = phases.product(top, phase);
        product.c = image + (top * w.big_width + phase) * w.channels;
        product.c_m = w.stride_width * w.channels;
        for (int64_t y = top; y < w.big_height; y += w.stride_height) {
          strided_product(product);
          product.a += phases.row_stride();
          product.c += w.stride_height * w.big_width * w.channels;
        }
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
