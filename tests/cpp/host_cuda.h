// Just enough of CUDA to execute csrc/kernels/cuda/*.cu on a CPU: blocks in turn, the threads of a block as threads, so
// that sanitizers see each index that runs off an array and each missing __syncthreads. Included in front of those
// files (CMakeLists.txt); cuda/launch.cuh says what a kernel may use. Says nothing about speed.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__ static  // blocks run in turn, so one object serves them all
#define __launch_bounds__(...)
#define __grid_constant__

// Few blocks, so that small arrays take several strides over the grid; two warps, so that they have to meet.
#define FASTVAE_CUDA_MAX_BLOCKS 3
#define FASTVAE_CUDA_THREADS 64
#define FASTVAE_DYNAMIC_SHARED(TYPE, NAME) TYPE* const NAME = reinterpret_cast<TYPE*>(host_cuda::block->dynamic.data())
#define FASTVAE_CUDA_LAUNCH(KERNEL, GRID, BLOCK, SHARED, STREAM, ...) \
  host_cuda::run(GRID, BLOCK, SHARED, [&] { KERNEL(__VA_ARGS__); })

struct dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};
inline thread_local dim3 threadIdx;
inline thread_local dim3 blockIdx;
inline thread_local dim3 blockDim;
inline thread_local dim3 gridDim;

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

// One device, with the shared memory of an H100.
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int device) {
  *value = 227 * 1024;
  return device == 0 ? cudaSuccess : 1;
}

namespace host_cuda {

constexpr unsigned kWarp = 32;

struct Block {
  Block(unsigned threads, size_t shared_bytes) : all(threads), dynamic(shared_bytes), exchange(threads) {
    for (unsigned first = 0; first < threads; first += kWarp) {
      warps.emplace_back(std::min(kWarp, threads - first));
    }
  }

  std::barrier<> all;
  std::deque<std::barrier<>> warps;
  std::vector<unsigned char> dynamic;
  std::vector<uint64_t> exchange;
};
inline thread_local Block* block = nullptr;

// The threads of a block, kept from launch to launch.
class Pool {
 public:
  explicit Pool(unsigned threads) : start_(threads + 1), turn_(threads + 1) {
    for (unsigned t = 0; t < threads; ++t) {
      threads_.emplace_back([this, t, threads] {
        threadIdx.x = t;
        blockDim.x = threads;
        for (start_.arrive_and_wait(); job_; start_.arrive_and_wait()) {
          job_();
          // A thread that has returned is not waited for any longer.
          block->warps[t / kWarp].arrive_and_drop();
          block->all.arrive_and_drop();
          turn_.arrive_and_wait();
        }
      });
    }
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    job_ = nullptr;
    start_.arrive_and_wait();
    for (std::thread& thread : threads_) {
      thread.join();
    }
  }

  size_t size() const { return threads_.size(); }

  void run(std::function<void()> job) {
    job_ = std::move(job);
    start_.arrive_and_wait();
    turn_.arrive_and_wait();
  }

 private:
  std::barrier<> start_;
  std::barrier<> turn_;
  std::function<void()> job_;
  std::vector<std::thread> threads_;
};

inline std::unique_ptr<Pool> pool;

template <typename Call>
void run(unsigned grid, unsigned threads, size_t shared_bytes, Call call) {
  if (pool == nullptr || pool->size() != threads) {
    pool = std::make_unique<Pool>(threads);
  }
  for (unsigned b = 0; b < grid; ++b) {
    Block state(threads, shared_bytes);
    pool->run([&] {
      blockIdx.x = b;
      gridDim.x = grid;
      block = &state;
      call();
    });
  }
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::block->all.arrive_and_wait(); }
inline void __syncwarp(unsigned = 0xffffffffU) {
  host_cuda::block->warps[threadIdx.x / host_cuda::kWarp].arrive_and_wait();
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&host_cuda::block->exchange[threadIdx.x], &value, sizeof(T));
  __syncwarp();
  std::memcpy(&value, &host_cuda::block->exchange[threadIdx.x ^ static_cast<unsigned>(lane)], sizeof(T));
  __syncwarp();
  return value;
}
