// Unfold and fold on a GPU (cpu/convolution.cpp is the twin). One thread a number of the result, memory bound; fold
// gathers instead of scattering, so that it needs no atomics.
#include "launch.cuh"

namespace fastvae::cuda {

template <typename T>
__global__ void unfold_kernel(const Unfold<T> args) {
  const ConvolutionWindow& w = args.window;
  const int64_t size = args.samples * w.height * w.width * w.kernel_height * w.kernel_width * w.channels;
  for (Walk at(global_thread(), global_threads(), size, w.channels); at.inside(); at.next()) {
    int64_t rest = at.i / w.channels;
    const int64_t j = rest % w.kernel_width;
    rest /= w.kernel_width;
    const int64_t i = rest % w.kernel_height;
    rest /= w.kernel_height;
    const int64_t x = rest % w.width;
    rest /= w.width;
    const int64_t y = rest % w.height;
    const int64_t sample = rest / w.height;
    const int64_t row = y * w.stride_height - w.padding_height + i * w.dilation_height;
    const int64_t column = x * w.stride_width - w.padding_width + j * w.dilation_width;
    const bool inside = row >= 0 && row < w.big_height && column >= 0 && column < w.big_width;
    args.columns[at.i] =
        inside ? args.image[((sample * w.big_height + row) * w.big_width + column) * w.channels + at.column] : T(0);
  }
}

// The position whose tap `tap` meets pixel `at` along one axis, or -1.
__device__ inline int64_t position_of(int64_t at, int64_t tap, int64_t stride, int64_t padding, int64_t dilation,
                                      int64_t positions) {
  const int64_t from = at + padding - tap * dilation;
  return from >= 0 && from % stride == 0 && from / stride < positions ? from / stride : -1;
}

template <typename T>
__global__ void fold_kernel(const Fold<T> args) {
  const ConvolutionWindow& w = args.window;
  const int64_t size = args.samples * w.big_height * w.big_width * w.channels;
  for (Walk at(global_thread(), global_threads(), size, w.channels); at.inside(); at.next()) {
    int64_t rest = at.i / w.channels;
    const int64_t column = rest % w.big_width;
    rest /= w.big_width;
    const int64_t row = rest % w.big_height;
    const int64_t sample = rest / w.big_height;
    T sum = T(0);
    for (int64_t i = 0; i < w.kernel_height; ++i) {
      const int64_t y = position_of(row, i, w.stride_height, w.padding_height, w.dilation_height, w.height);
      for (int64_t j = 0; y >= 0 && j < w.kernel_width; ++j) {
        const int64_t x = position_of(column, j, w.stride_width, w.padding_width, w.dilation_width, w.width);
        if (x >= 0) {
          const int64_t tap = (((sample * w.height + y) * w.width + x) * w.kernel_height + i) * w.kernel_width + j;
          sum += args.columns[tap * w.channels + at.column];
        }
      }
    }
    args.image[at.i] = sum;
  }
}

template <typename T>
void unfold_launch(const Unfold<T>& args, Stream stream) {
  const ConvolutionWindow& w = args.window;
  launch("unfold", unfold_kernel<T>,
         grid_for_elements(args.samples * w.height * w.width * w.kernel_height * w.kernel_width * w.channels), stream,
         args);
}

template <typename T>
void fold_launch(const Fold<T>& args, Stream stream) {
  const ConvolutionWindow& w = args.window;
  launch("fold", fold_kernel<T>, grid_for_elements(args.samples * w.big_height * w.big_width * w.channels), stream,
         args);
}

FASTVAE_DEFINE_CUDA(unfold, Unfold)
FASTVAE_DEFINE_CUDA(fold, Fold)

}  // namespace fastvae::cuda
