// Unfold and fold on a GPU (cpu/convolution.cpp is the twin), memory bound: a thread takes some neighbouring channels
// of the result, as many as 16 bytes hold where they lie so; fold gathers instead of scattering, so that it needs no
// atomics. Indices are of 32 bits where the arrays are that small: a division of 64 bits takes longer than the copy.
#include "launch.cuh"

namespace fastvae::cuda {

template <typename Index>
struct Pixel {
  Index sample, row, column;
};

template <typename Index>
__device__ Pixel<Index> pixel_of(Index i, Index height, Index width) {
  const Index rows = i / width;
  return {rows / height, rows % height, i % width};
}

template <typename T, int kCount, typename Index>
__global__ void unfold_kernel(const Unfold<T> args) {
  using Channels = Packed<T, kCount>;
  const ConvolutionWindow& w = args.window;
  const auto packs = static_cast<Index>(w.channels / kCount);
  const auto taps = static_cast<Index>(w.kernel_height * w.kernel_width);
  const Index size = static_cast<Index>(args.samples * w.height * w.width) * taps * packs;
  const auto* image = reinterpret_cast<const Channels*>(args.image);
  auto* columns = reinterpret_cast<Channels*>(args.columns);
  for (auto i = static_cast<Index>(global_thread()); i < size; i += static_cast<Index>(global_threads())) {
    const Index patch = i / packs, tap = patch % taps;
    const auto at = pixel_of<Index>(patch / taps, static_cast<Index>(w.height), static_cast<Index>(w.width));
    const auto kernel_width = static_cast<Index>(w.kernel_width);
    const Index row = at.row * static_cast<Index>(w.stride_height) - static_cast<Index>(w.padding_height) +
                      tap / kernel_width * static_cast<Index>(w.dilation_height);
    const Index column = at.column * static_cast<Index>(w.stride_width) - static_cast<Index>(w.padding_width) +
                         tap % kernel_width * static_cast<Index>(w.dilation_width);
    const auto height = static_cast<Index>(w.big_height), width = static_cast<Index>(w.big_width);
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    columns[i] = inside ? image[((at.sample * height + row) * width + column) * packs + i % packs] : Channels{};
  }
}

// The taps along one axis that meet a pixel, from the last position to the first: tap t of position (from - t dilation)
// / stride. Without dilation every stride-th tap meets, and no position is looked for in vain.
template <typename Index>
struct Taps {
  __device__ Taps(Index pixel, int64_t stride, int64_t padding, int64_t dilation, int64_t positions)
      : from_(pixel + static_cast<Index>(padding)),
        stride_(static_cast<Index>(stride)),
        dilation_(static_cast<Index>(dilation)),
        positions_(static_cast<Index>(positions)) {}

  template <typename Body>
  __device__ void each(int64_t kernel, const Body& body) const {
    if (dilation_ == 1) {
      Index position = from_ / stride_;
      for (Index tap = from_ % stride_; tap < static_cast<Index>(kernel) && position >= 0; tap += stride_, --position) {
        if (position < positions_) {
          body(tap, position);
        }
      }
      return;
    }
    for (Index tap = 0; tap < static_cast<Index>(kernel); ++tap) {
      const Index rest = from_ - tap * dilation_;
      if (rest >= 0 && rest % stride_ == 0 && rest / stride_ < positions_) {
        body(tap, rest / stride_);
      }
    }
  }

 private:
  Index from_, stride_, dilation_, positions_;
};

template <typename T, int kCount, typename Index>
__global__ void fold_kernel(const Fold<T> args) {
  using Channels = Packed<T, kCount>;
  const ConvolutionWindow& w = args.window;
  const auto packs = static_cast<Index>(w.channels / kCount);
  const Index size = static_cast<Index>(args.samples * w.big_height * w.big_width) * packs;
  const auto* columns = reinterpret_cast<const Channels*>(args.columns);
  auto* image = reinterpret_cast<Channels*>(args.image);
  for (auto i = static_cast<Index>(global_thread()); i < size; i += static_cast<Index>(global_threads())) {
    const auto at = pixel_of<Index>(i / packs, static_cast<Index>(w.big_height), static_cast<Index>(w.big_width));
    const Index pack = i % packs;
    Channels sum{};
    Taps<Index>(at.row, w.stride_height, w.padding_height, w.dilation_height, w.height)
        .each(w.kernel_height, [&](Index tap_y, Index y) {
          Taps<Index>(at.column, w.stride_width, w.padding_width, w.dilation_width, w.width)
              .each(w.kernel_width, [&](Index tap_x, Index x) {
                const Index position = (at.sample * static_cast<Index>(w.height) + y) * static_cast<Index>(w.width) + x;
                const Index tap =
                    (position * static_cast<Index>(w.kernel_height) + tap_y) * static_cast<Index>(w.kernel_width) +
                    tap_x;
                const Channels found = columns[tap * packs + pack];
#pragma unroll
                for (int c = 0; c < kCount; ++c) {
                  sum.value[c] += found.value[c];
                }
              });
        });
    image[i] = sum;
  }
}

// Calls body with the widest pack and the narrowest index that these arrays allow.
template <typename T, typename Body>
void with_widths(const ConvolutionWindow& w, int64_t samples, const T* image, const T* columns, const Body& body) {
  constexpr int kWide = kWidePack<T>;
  const int64_t patches = samples * w.height * w.width * w.kernel_height * w.kernel_width;
  const int64_t size = std::max(patches, samples * w.big_height * w.big_width) * w.channels;
  const bool wide = w.channels % kWide == 0 && is_aligned_for_packs(image) && is_aligned_for_packs(columns);
  // A stride of the grid beyond the last number must not overflow either.
  const bool small = size < (int64_t{1} << 30);
  const auto with_index = [&](auto count) { small ? body(count, int32_t{0}) : body(count, int64_t{0}); };
  wide ? with_index(std::integral_constant<int, kWide>{}) : with_index(std::integral_constant<int, 1>{});
}

template <typename T>
void unfold_launch(const Unfold<T>& args, Stream stream) {
  const ConvolutionWindow& w = args.window;
  with_widths(w, args.samples, args.image, args.columns, [&](auto count, auto index) {
    constexpr int kCount = decltype(count)::value;
    const int64_t patches = args.samples * w.height * w.width * w.kernel_height * w.kernel_width;
    launch("unfold", unfold_kernel<T, kCount, decltype(index)>, grid_for_elements(patches * w.channels / kCount),
           stream, args);
  });
}

template <typename T>
void fold_launch(const Fold<T>& args, Stream stream) {
  const ConvolutionWindow& w = args.window;
  with_widths(w, args.samples, args.image, args.columns, [&](auto count, auto index) {
    constexpr int kCount = decltype(count)::value;
    launch("fold", fold_kernel<T, kCount, decltype(index)>,
           grid_for_elements(args.samples * w.big_height * w.big_width * w.channels / kCount), stream, args);
  });
}

FASTVAE_DEFINE_CUDA(unfold, Unfold)
FASTVAE_DEFINE_CUDA(fold, Fold)

}  // namespace fastvae::cuda
