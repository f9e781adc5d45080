// Convolutions of which every sample owns the weights (../copied_convolution.h). A few dozen positions at a time, the
// patches that they see are laid out as the rows of a matrix, which stays in the caches, and are one operand of a
// product, or its result.
//
// Cost a sample: 2 positions * taps * channels * filters / groups FLOPs; a copy of every patch; for the way back to the
// larger image a transposed copy of the weights.
#include "../copied_convolution.h"

#include <algorithm>
#include <vector>

#include "../kernels.h"
#include "clones.h"
#include "strided_product.h"

namespace fastvae::cpu {
namespace {

constexpr int64_t kNumbers = 32768;  // of a block of columns

// The columns of one image, [positions, taps, channels].
template <typename T>
class Columns {
 public:
  explicit Columns(const CopiedWindow& window)
      : window_(window),
        run_(window.dilation[2] == 1 ? window.kernel[2] : 1),
        width_(window.taps() * window.channels),
        block_(std::max<int64_t>(1, std::min(window.positions(), kNumbers / std::max<int64_t>(1, width_)))),
        is_image_(window.taps() == 1 && std::equal(window.big, window.big + kCopiedAxes, window.small) &&
                  window.padding[0] + window.padding[1] + window.padding[2] == 0),
        data_(static_cast<size_t>(is_image_ ? 0 : block_ * width_)) {}

  int64_t width() const { return width_; }
  int64_t block() const { return block_; }
  T* data() { return data_.data(); }

  // Those of `count` positions from `first` on.
  FASTVAE_INLINE const T* read(const T* image, int64_t first, int64_t count) {
    if (is_image_) {
      return image + first * width_;
    }
    each_run(first, count,
             [&](T* columns, int64_t place, int64_t before, int64_t inside, int64_t all) FASTVAE_LAMBDA_INLINE {
               const int64_t c = window_.channels;
               std::fill_n(columns, before * c, T(0));
               std::copy_n(image + place * c, inside * c, columns + before * c);
               std::fill_n(columns + (before + inside) * c, (all - before - inside) * c, T(0));
             });
    return data_.data();
  }

  // Their adjoint: adds them to the image.
  FASTVAE_INLINE void add(T* image, int64_t first, int64_t count) {
    if (is_image_) {
      return;
    }
    each_run(first, count,
             [&](T* columns, int64_t place, int64_t before, int64_t inside, int64_t) FASTVAE_LAMBDA_INLINE {
               const int64_t c = window_.channels;
               T* target = image + place * c;
               const T* source = columns + before * c;
#pragma GCC ivdep
               for (int64_t j = 0; j < inside * c; ++j) {
                 target[j] += source[j];
               }
             });
  }

  bool is_image() const { return is_image_; }

 private:
  // body(columns, first place in the image, taps before it that are outside, inside, of the run)
  template <typename Body>
  FASTVAE_INLINE void each_run(int64_t first, int64_t count, const Body& body) {
    const CopiedWindow& w = window_;
    T* columns = data_.data();
    for (int64_t position = first; position < first + count; ++position) {
      const int64_t at[kCopiedAxes] = {position / (w.small[1] * w.small[2]), position / w.small[2] % w.small[1],
                                       position % w.small[2]};
      for (int64_t i = 0; i < w.kernel[0]; ++i) {
        const int64_t z = at[0] * w.stride[0] - w.padding[0] + i * w.dilation[0];
        for (int64_t j = 0; j < w.kernel[1]; ++j) {
          const int64_t y = at[1] * w.stride[1] - w.padding[1] + j * w.dilation[1];
          const bool is_row = z >= 0 && z < w.big[0] && y >= 0 && y < w.big[1];
          for (int64_t k = 0; k < w.kernel[2]; k += run_, columns += run_ * w.channels) {
            const int64_t x = at[2] * w.stride[2] - w.padding[2] + k * w.dilation[2];
            const int64_t before = is_row ? std::min(run_, std::max<int64_t>(0, -x)) : run_;
            const int64_t inside = is_row ? std::max<int64_t>(0, std::min(run_, w.big[2] - x) - before) : 0;
            body(columns, inside > 0 ? (z * w.big[1] + y) * w.big[2] + x + before : 0, before, inside, run_);
          }
        }
      }
    }
  }

  const CopiedWindow& window_;
  const int64_t run_;  // taps that lie side by side in the image
  const int64_t width_;
  const int64_t block_;
  const bool is_image_;
  std::vector<T> data_;
};

// body(image, first position, how many)
template <typename T, typename Body>
FASTVAE_INLINE void each_block(const CopiedConvolution<T>& args, int64_t sample, int64_t block, const Body& body) {
  const int64_t positions = args.window.positions();
  for (int64_t image = sample * args.images; image < (sample + 1) * args.images; ++image) {
    for (int64_t first = 0; first < positions; first += block) {
      body(image, first, std::min(block, positions - first));
    }
  }
}

// out [columns, rows] of in [rows, columns], whose rows are `stride` apart.
template <typename T>
FASTVAE_INLINE void transpose(const T* in, int64_t rows, int64_t columns, int64_t stride, T* out) {
  constexpr int64_t kTile = 16;
  for (int64_t top = 0; top < rows; top += kTile) {
    const int64_t last = std::min(rows, top + kTile);
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t row = top; row < last; ++row) {
        out[column * rows + row] = in[row * stride + column];
      }
    }
  }
}

}  // namespace

template <typename T>
FASTVAE_INLINE void copied_convolution_small_template(const CopiedConvolution<T>& args, int64_t begin, int64_t end) {
  const CopiedWindow& w = args.window;
  const int64_t inputs = w.channels / w.groups, outputs = w.filters / w.groups;
  Columns<T> columns(w);
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* weight = args.weight + sample * w.taps() * inputs * w.filters;
    each_block(args, sample, columns.block(), [&](int64_t image, int64_t first, int64_t count) FASTVAE_LAMBDA_INLINE {
      const T* patches = columns.read(args.big + image * w.big_positions() * w.channels, first, count);
      T* small = args.small + (image * w.positions() + first) * w.filters;
      for (int64_t row = 0; args.bias != nullptr && row < count; ++row) {
        std::copy_n(args.bias + sample * w.filters, w.filters, small + row * w.filters);
      }
      for (int64_t g = 0; g < w.groups; ++g) {
        const bool one = w.groups == 1;  // then the taps follow each other
        strided_product(StridedProduct<T>{patches + g * inputs, columns.width(), 1, w.channels, weight + g * outputs,
                                          w.filters, inputs * w.filters, small + g * outputs, w.filters, count, outputs,
                                          one ? columns.width() : inputs, one ? 1 : w.taps(), args.bias != nullptr});
      }
    });
  }
}

template <typename T>
FASTVAE_INLINE void copied_convolution_big_template(const CopiedConvolution<T>& args, int64_t begin, int64_t end) {
  const CopiedWindow& w = args.window;
  const int64_t inputs = w.channels / w.groups, outputs = w.filters / w.groups;
  Columns<T> columns(w);
  // Of each group [outputs, taps, inputs].
  std::vector<T> weight(static_cast<size_t>(w.taps() * inputs * w.filters));
  for (int64_t sample = begin; sample < end; ++sample) {
    for (int64_t g = 0; g < w.groups; ++g) {
      transpose(args.weight + sample * w.taps() * inputs * w.filters + g * outputs, w.taps() * inputs, outputs,
                w.filters, weight.data() + g * outputs * w.taps() * inputs);
    }
    const int64_t numbers = w.big_positions() * w.channels;
    for (int64_t image = sample * args.images; image < (sample + 1) * args.images; ++image) {
      T* big = args.big + image * numbers;
      for (int64_t at = 0; at < w.big_positions(); ++at) {
        if (args.bias == nullptr) {
          std::fill_n(big + at * w.channels, w.channels, T(0));
        } else {
          std::copy_n(args.bias + sample * w.channels, w.channels, big + at * w.channels);
        }
      }
    }
    each_block(args, sample, columns.block(), [&](int64_t image, int64_t first, int64_t count) FASTVAE_LAMBDA_INLINE {
      const T* small = args.small + (image * w.positions() + first) * w.filters;
      T* big = args.big + image * numbers;
      T* target = columns.is_image() ? big + first * w.channels : columns.data();
      for (int64_t g = 0; g < w.groups; ++g) {
        const T* of_group = weight.data() + g * outputs * w.taps() * inputs;
        // Of several groups a tap's channels are not all of the columns' next numbers.
        const int64_t parts = w.groups == 1 ? 1 : w.taps(), each = w.taps() / parts * inputs;
        for (int64_t part = 0; part < parts; ++part) {
          strided_product(StridedProduct<T>{small + g * outputs, w.filters, 1, 0, of_group + part * each,
                                            w.taps() * inputs, 0, target + part * w.channels + g * inputs,
                                            columns.width(), count, each, outputs, 1, columns.is_image()});
        }
      }
      columns.add(big, first, count);
    });
  }
}

template <typename T>
FASTVAE_INLINE void copied_convolution_weight_template(const CopiedConvolution<T>& args, int64_t begin, int64_t end) {
  const CopiedWindow& w = args.window;
  const int64_t inputs = w.channels / w.groups, outputs = w.filters / w.groups;
  Columns<T> columns(w);
  for (int64_t sample = begin; sample < end; ++sample) {
    T* weight = args.weight + sample * w.taps() * inputs * w.filters;
    bool accumulate = false;
    each_block(args, sample, columns.block(), [&](int64_t image, int64_t first, int64_t count) FASTVAE_LAMBDA_INLINE {
      const T* patches = columns.read(args.big + image * w.big_positions() * w.channels, first, count);
      const T* small = args.small + (image * w.positions() + first) * w.filters;
      const int64_t parts = w.groups == 1 ? 1 : w.taps(), each = w.taps() / parts * inputs;
      for (int64_t g = 0; g < w.groups; ++g) {
        for (int64_t part = 0; part < parts; ++part) {
          strided_product(StridedProduct<T>{
              patches + part * w.channels + g * inputs, 1, columns.width(), 0, small + g * outputs, w.filters, 0,
              weight + part * inputs * w.filters + g * outputs, w.filters, each, outputs, count, 1, accumulate});
        }
      }
      accumulate = true;
    });
  }
}

FASTVAE_DEFINE_CPU(copied_convolution_small, CopiedConvolution)
FASTVAE_DEFINE_CPU(copied_convolution_big, CopiedConvolution)
FASTVAE_DEFINE_CPU(copied_convolution_weight, CopiedConvolution)

}  // namespace fastvae::cpu
