// How every CUDA kernel of fastvae is launched and what its blocks share: grid-stride loops, and reductions in an order
// that does not depend on timing (no atomics), so that results repeat to the bit.
//
// The same sources run on a CPU for their logic: tests/cpp/host_cuda.h, included in front of them, defines what is
// under __CUDACC__ here. So kernels use only FASTVAE_CUDA_LAUNCH, FASTVAE_SHARED, FASTVAE_DYNAMIC_SHARED, __syncthreads
// and __shfl_xor_sync besides the built-in indices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define FASTVAE_CUDA_LAUNCH(KERNEL, GRID, BLOCK, SHARED, STREAM, ...) \
  KERNEL<<<GRID, BLOCK, SHARED, static_cast<cudaStream_t>(STREAM)>>>(__VA_ARGS__)

// An array in the block's shared memory: FASTVAE_SHARED(T, sums, [kWarps][kWarp]).
#define FASTVAE_SHARED(TYPE, NAME, SIZES) __shared__ TYPE NAME SIZES

// Names the block's dynamic shared memory as an array of TYPE.
#define FASTVAE_DYNAMIC_SHARED(TYPE, NAME)                         \
  extern __shared__ __align__(16) unsigned char fastvae_dynamic[]; \
  TYPE* const NAME = reinterpret_cast<TYPE*>(fastvae_dynamic)

// Enough to fill the largest GPU several times over; a grid-stride loop does the rest.
#define FASTVAE_CUDA_MAX_BLOCKS 4096
#define FASTVAE_CUDA_THREADS 256
#endif

namespace fastvae::cuda {

constexpr int kThreads = FASTVAE_CUDA_THREADS;
constexpr int kWarp = 32;
constexpr size_t kStaticShared = 48 * 1024;  // more dynamic shared memory than this has to be asked for

struct Grid {
  int64_t blocks;
  int threads = kThreads;
  size_t shared_bytes = 0;
};

// A thread an element. Few of them are spread over an H100's multiprocessors, in blocks of a warp at least.
inline Grid grid_for_elements(int64_t count) {
  constexpr int64_t kMultiprocessors = 132;
  int threads = kThreads;
  while (threads > kWarp && count < kMultiprocessors * threads) {
    threads /= 2;
  }
  return {(count + threads - 1) / threads, threads};
}

inline void check(cudaError_t status, const char* kernel) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("fastvae::cuda::") + kernel + ": " + cudaGetErrorString(status));
  }
}

// Launches kernel(args...) on the stream. More blocks are asked for than are launched where the grid is capped, so
// every kernel strides over its index by gridDim.x.
template <typename Kernel, typename... Args>
void launch(const char* name, Kernel kernel, const Grid& grid, Stream stream, const Args&... args) {
  if (grid.blocks == 0) {
    return;
  }
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(grid.blocks, FASTVAE_CUDA_MAX_BLOCKS));
  if (grid.shared_bytes > kStaticShared) {
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)),
        name);
  }
  FASTVAE_CUDA_LAUNCH(kernel, blocks, static_cast<unsigned>(grid.threads), grid.shared_bytes, stream, args...);
  check(cudaGetLastError(), name);
}

// Defines the float and the double kernel of kernels.h from NAME_launch<T>.
#define FASTVAE_DEFINE_CUDA(NAME, ARGS)                                                     \
  void NAME(const ARGS<float>& args, Stream stream) { NAME##_launch<float>(args, stream); } \
  void NAME(const ARGS<double>& args, Stream stream) { NAME##_launch<double>(args, stream); }

// A thread's walk over i = first, first + stride, ... < size, beside i % width, without a division a step.
class Walk {
 public:
  __device__ Walk(int64_t first, int64_t stride, int64_t size, int64_t width)
      : i(first), column(first % width), stride_(stride), size_(size), width_(width), column_stride_(stride % width) {}

  __device__ bool inside() const { return i < size_; }

  __device__ void next() {
    i += stride_;
    column += column_stride_;
    column -= column >= width_ ? width_ : 0;
  }

  int64_t i;
  int64_t column;

 private:
  int64_t stride_;
  int64_t size_;
  int64_t width_;
  int64_t column_stride_;
};

// Neighbouring numbers, moved at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Packed {
  T value[kCount];
};

// Of 16 bytes, the most that a thread moves at once.
template <typename T>
constexpr int kWidePack = static_cast<int>(16 / sizeof(T));

inline bool is_aligned_for_packs(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t global_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Over the 32 lanes of a warp, or over each kLanes neighbours of them, the result in each. Every lane of the warp must
// call.
template <int kLanes = kWarp, typename T>
__device__ T warp_sum(T value) {
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, lane);
  }
  return value;
}

template <int kLanes = kWarp, typename T>
__device__ T warp_max(T value) {
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    const T other = __shfl_xor_sync(0xffffffffU, value, lane);
    value = other > value ? other : value;
  }
  return value;
}

// out[row, o] = sum over chunks of partial[row, chunk, o], in their order: what several blocks have summed of a row.
template <typename T>
__global__ void sum_chunks_kernel(const T* partial, T* out, int64_t rows, int64_t chunks, int64_t width) {
  for (Walk at(global_thread(), global_threads(), rows * width, width); at.inside(); at.next()) {
    const T* first = partial + at.i / width * chunks * width + at.column;
    T sum = T(0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += first[chunk * width];
    }
    out[at.i] = sum;
  }
}

template <typename T>
void sum_chunks(const T* partial, T* out, int64_t rows, int64_t chunks, int64_t width, Stream stream) {
  launch("sum_chunks", sum_chunks_kernel<T>, grid_for_elements(rows * width), stream, partial, out, rows, chunks,
         width);
}

// Over a block of kThreads, the result in thread 0. Every thread of the block must call.
template <typename T>
__device__ T block_sum(T value) {
  FASTVAE_SHARED(T, of_warp, [kThreads / kWarp]);
  value = warp_sum(value);
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % kWarp == 0) {
    of_warp[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  T sum = T(0);
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
      sum += of_warp[warp];
    }
  }
  return sum;
}

}  // namespace fastvae::cuda
