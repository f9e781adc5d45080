// The parts of a transposed convolution that are not a GEMM, where ATen's run far from their floor on a CPU:
//
//   y = fold(h W)          forward and tangent      h [B H W, C_in], W [C_in, kh kw C_out]
//   g = unfold(delta) W^T  reverse and adjoint      dW = h^T unfold(delta)
//
// fold and unfold move kh kw C_out numbers a position once through a workspace that stays in the L2 cache: no FLOPs
// (fold: one addition each), 4 to 8 bytes. To one to three channels, where such a GEMM would be too narrow, the whole
// transposed convolution is one kernel: 2 H W kh kw C_in C_out FLOPs a sample, in registers along a row of the input.
#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "clones.h"

namespace fastvae::cpu {

// Calls body(patch, pixel): offsets into columns and image of the `channels` numbers that meet there.
template <typename Body>
FASTVAE_INLINE void for_each_tap(const ConvolutionWindow& w, int64_t sample, const Body& body) {
  int64_t patch = sample * w.height * w.width * w.kernel_height * w.kernel_width * w.channels;
  const int64_t image = sample * w.big_height * w.big_width * w.channels;
  for (int64_t y = 0; y < w.height; ++y) {
    for (int64_t x = 0; x < w.width; ++x) {
      for (int64_t i = 0; i < w.kernel_height; ++i) {
        const int64_t row = y * w.stride_height - w.padding_height + i * w.dilation_height;
        for (int64_t j = 0; j < w.kernel_width; ++j, patch += w.channels) {
          const int64_t column = x * w.stride_width - w.padding_width + j * w.dilation_width;
          const bool inside = row >= 0 && row < w.big_height && column >= 0 && column < w.big_width;
          body(patch, inside ? image + (row * w.big_width + column) * w.channels : int64_t(-1));
        }
      }
    }
  }
}

template <typename T>
FASTVAE_INLINE void unfold_template(const Unfold<T>& args, int64_t begin, int64_t end) {
  const int64_t channels = args.window.channels;
  for (int64_t sample = begin; sample < end; ++sample) {
    for_each_tap(args.window, sample, [&](int64_t patch, int64_t pixel) FASTVAE_LAMBDA_INLINE {
      T* columns = args.columns + patch;
      if (pixel < 0) {
        std::fill_n(columns, channels, T(0));
      } else {
        std::copy_n(args.image + pixel, channels, columns);
      }
    });
  }
}

template <typename T>
FASTVAE_INLINE void fold_template(const Fold<T>& args, int64_t begin, int64_t end) {
  const int64_t channels = args.window.channels;
  const int64_t size = args.window.big_height * args.window.big_width * channels;
  for (int64_t sample = begin; sample < end; ++sample) {
    std::fill_n(args.image + sample * size, size, T(0));
    for_each_tap(args.window, sample, [&](int64_t patch, int64_t pixel) FASTVAE_LAMBDA_INLINE {
      if (pixel >= 0) {
        const T* columns = args.columns + patch;
        T* image = args.image + pixel;
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
          image[c] += columns[c];
        }
      }
    });
  }
}

// One sample: the input is turned channel first so that a row of it is a vector; each tap of the kernel adds
// weight * row to the row of its phase (the output columns of one residue modulo the stride), which is dense too.
template <typename T>
FASTVAE_INLINE void narrow_conv_transpose_template(const NarrowConvTranspose<T>& args, int64_t begin, int64_t end) {
  const ConvolutionWindow& w = args.window;
  const int64_t in_channels = args.in_channels;
  const int64_t pixels = w.height * w.width;
  const int64_t taps = w.kernel_height * w.kernel_width;
  const int64_t phase_width = (w.big_width + w.stride_width - 1) / w.stride_width + 2 * w.width;
  constexpr int64_t kBlock = 16;
  const int64_t padded = (w.width + kBlock - 1) / kBlock * kBlock;
  std::vector<T> planes(in_channels * w.height * padded, T(0));
  std::vector<T> phases(w.stride_width * (phase_width + kBlock));
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* in = args.in + sample * pixels * in_channels;
    for (int64_t y = 0; y < w.height; ++y) {
      for (int64_t x = 0; x < w.width; ++x) {
        for (int64_t c = 0; c < in_channels; ++c) {
          planes[(c * w.height + y) * padded + x] = in[(y * w.width + x) * in_channels + c];
        }
      }
    }
    T* out = args.out + sample * w.big_height * w.big_width * w.channels;
    for (int64_t channel = 0; channel < w.channels; ++channel) {
      for (int64_t row = 0; row < w.big_height; ++row) {
        std::fill(phases.begin(), phases.end(), T(0));
        for (int64_t i = 0; i < w.kernel_height; ++i) {
          const int64_t shifted = row + w.padding_height - i * w.dilation_height;
          if (shifted < 0 || shifted % w.stride_height != 0 || shifted / w.stride_height >= w.height) {
            continue;
          }
          const int64_t y = shifted / w.stride_height;
          for (int64_t j = 0; j < w.kernel_width; ++j) {
            // Input column x lands on output column stride x + offset: phase offset mod stride, place x + offset /
            // stride.
            const int64_t offset = j * w.dilation_width - w.padding_width;
            const int64_t quotient =
                offset >= 0 ? offset / w.stride_width : -((-offset + w.stride_width - 1) / w.stride_width);
            const int64_t phase = offset - quotient * w.stride_width;
            // Places start at -width at the lowest; the buffer has that much room on its left.
            const int64_t place = std::clamp(quotient, -w.width, phase_width - 2 * w.width) + w.width;
            if (place != quotient + w.width) {
              continue;  // the whole row lands outside
            }
            T* target = phases.data() + phase * (phase_width + kBlock) + place;
            const T* weight = args.weight + channel * taps + i * w.kernel_width + j;
            for (int64_t x = 0; x < w.width; x += kBlock) {
              T sum[kBlock];
              for (int64_t lane = 0; lane < kBlock; ++lane) {
                sum[lane] = target[x + lane];
              }
              for (int64_t c = 0; c < in_channels; ++c) {
                const T factor = weight[c * w.channels * taps];
                const T* plane = planes.data() + (c * w.height + y) * padded + x;
                for (int64_t lane = 0; lane < kBlock; ++lane) {
                  sum[lane] += factor * plane[lane];
                }
              }
              for (int64_t lane = 0; lane < kBlock; ++lane) {
                target[x + lane] = sum[lane];
              }
            }
          }
        }
        T* out_row = out + row * w.big_width * w.channels + channel;
        for (int64_t phase = 0; phase < w.stride_width; ++phase) {
          const T* source = phases.data() + phase * (phase_width + kBlock) + w.width;
          for (int64_t x = phase, place = 0; x < w.big_width; x += w.stride_width, ++place) {
            out_row[x * w.channels] = source[place];
          }
        }
      }
    }
  }
}

FASTVAE_DEFINE_CPU(unfold, Unfold)
FASTVAE_DEFINE_CPU(fold, Fold)
FASTVAE_DEFINE_CPU(narrow_conv_transpose, NarrowConvTranspose)

}  // namespace fastvae::cpu
