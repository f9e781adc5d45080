// Unfold and fold, the parts of a transposed convolution by columns that are not a GEMM:
//
//   y = fold(h W)          forward and tangent      h [B H W, C_in], W [C_in, kh kw C_out]
//   g = unfold(delta) W^T  reverse and adjoint      dW = h^T unfold(delta)
//
// They move kh kw C_out numbers a position once through a workspace that stays in the L2 cache: no FLOPs (fold: one
// addition each), 4 to 8 bytes. direct_convolution.cpp does without them, but knows no dilation.
#include <algorithm>

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

FASTVAE_DEFINE_CPU(unfold, Unfold)
FASTVAE_DEFINE_CPU(fold, Fold)

}  // namespace fastvae::cpu
