// Dot products of per-sample gradients on a GPU (kernels.h gives the formula).
//
// A block owns a tile of pairs of samples; a thread, kPairs x kPairs of them. For every layer and pair of terms both
// Gram products are formed in its registers, from panels in shared memory, multiplied and added up: nothing but the
// factors is read, and each output is written once. Sums run in one order, so results repeat to the bit.
#include "launch.cuh"

namespace fastvae::cuda {

constexpr int kSide = kThreads == 256 ? 16 : 8;  // threads of a block along a tile
static_assert(kSide * kSide == kThreads);
constexpr int kPairs = 4;
constexpr int kTile = kSide * kPairs;
constexpr int kPanel = 16;  // features in shared memory at once

// The rows of a tile: [rows], `stride` numbers apart.
template <typename T>
struct TileRows {
  const T* first;
  int64_t stride;
  int64_t count;
};

// panel[feature][row], zero beyond the rows and features that exist; padded against bank conflicts.
template <typename T>
__device__ void load_panel(T (&panel)[kPanel][kTile + 1], const TileRows<T>& rows, int64_t first, int64_t features) {
  for (int i = threadIdx.x; i < kPanel * kTile; i += kThreads) {
    const int feature = i % kPanel, row = i / kPanel;
    const bool inside = row < rows.count && first + feature < features;
    panel[feature][row] = inside ? rows.first[row * rows.stride + first + feature] : T(0);
  }
}

// sum[i][j] = a_row . b_row for the thread's pairs. All threads of the block must call.
template <typename T>
__device__ void gram(T (&sum)[kPairs][kPairs], const TileRows<T>& a, const TileRows<T>& b, int64_t features) {
  __shared__ T panel_a[kPanel][kTile + 1];
  __shared__ T panel_b[kPanel][kTile + 1];
  const int row = static_cast<int>(threadIdx.x) / kSide, column = static_cast<int>(threadIdx.x) % kSide;
  for (int i = 0; i < kPairs; ++i) {
    for (int j = 0; j < kPairs; ++j) {
      sum[i][j] = T(0);
    }
  }
  for (int64_t first = 0; first < features; first += kPanel) {
    __syncthreads();  // the panels before have been read
    load_panel(panel_a, a, first, features);
    load_panel(panel_b, b, first, features);
    __syncthreads();
#pragma unroll 4  // all of it spills registers
    for (int k = 0; k < kPanel; ++k) {
      T of_a[kPairs], of_b[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        of_a[i] = panel_a[k][row + i * kSide];
        of_b[i] = panel_b[k][column + i * kSide];
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          sum[i][j] += of_a[i] * of_b[j];
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) grad_dot_kernel(const GradDot<T> args) {
  const int row = static_cast<int>(threadIdx.x) / kSide, column = static_cast<int>(threadIdx.x) % kSide;
  const int64_t tiles_b = (args.samples_b + kTile - 1) / kTile;
  const int64_t tiles = (args.samples_a + kTile - 1) / kTile * tiles_b;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_a = tile / tiles_b * kTile, first_b = tile % tiles_b * kTile;
    const int64_t count_a = args.samples_a - first_a, count_b = args.samples_b - first_b;
    T total[kPairs][kPairs] = {};
    for (int l = 0; l < args.depth; ++l) {
      const GradDotLayer<T>& layer = args.layer[l];
      const T bias = layer.bias ? T(1) : T(0);
      for (int64_t t = 0; t < layer.terms_a; ++t) {
        const int64_t term_a = first_a * layer.terms_a + t;
        for (int64_t u = 0; u < layer.terms_b; ++u) {
          const int64_t term_b = first_b * layer.terms_b + u;
          T of_inputs[kPairs][kPairs], of_grads[kPairs][kPairs];
          gram(of_inputs, {layer.inputs_a + term_a * layer.in, layer.terms_a * layer.in, count_a},
               {layer.inputs_b + term_b * layer.in, layer.terms_b * layer.in, count_b}, layer.in);
          gram(of_grads, {layer.grads_a + term_a * layer.out, layer.terms_a * layer.out, count_a},
               {layer.grads_b + term_b * layer.out, layer.terms_b * layer.out, count_b}, layer.out);
          for (int i = 0; i < kPairs; ++i) {
            for (int j = 0; j < kPairs; ++j) {
              total[i][j] += (of_inputs[i][j] + bias) * of_grads[i][j];
            }
          }
        }
      }
    }
    for (int i = 0; i < kPairs; ++i) {
      for (int j = 0; j < kPairs; ++j) {
        const int64_t a = row + i * kSide, b = column + j * kSide;
        if (a < count_a && b < count_b) {
          T* out = args.out + (first_a + a) * args.samples_b + first_b + b;
          *out = args.accumulate ? *out + total[i][j] : total[i][j];
        }
      }
    }
  }
}

template <typename T>
void grad_dot_launch(const GradDot<T>& args, Stream stream) {
  const int64_t tiles = ((args.samples_a + kTile - 1) / kTile) * ((args.samples_b + kTile - 1) / kTile);
  launch("grad_dot", grad_dot_kernel<T>, Grid{tiles}, stream, args);
}

FASTVAE_DEFINE_CUDA(grad_dot, GradDot)

}  // namespace fastvae::cuda
