// Just enough of CUDA to execute csrc/kernels/cuda/*.cu on a CPU: blocks in turn, the threads of a block as threads, so
// that sanitizers see each index that runs off an array and each missing __syncthreads. Blocks come in any order,
// dynamic shared memory begins as NaN, and what no device would launch throws. Included in front of those files
// (CMakeLists.txt); cuda/launch.cuh says what a kernel may use. Says nothing about speed.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
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
#define FASTVAE_CUDA_LAUNCH(KERNEL, GRID, BLOCK, SHARED, STREAM, ...)                     \
  host_cuda::check_launch(KERNEL, GRID, BLOCK, SHARED, host_cuda::bytes_of(__VA_ARGS__)); \
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

namespace host_cuda {

// Of an H100, as of most devices.
constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr int kMostShared = 227 * 1024, kSharedUnasked = 48 * 1024;
constexpr size_t kMostArgumentBytes = 4096;

// The dynamic shared memory that each kernel has asked for.
inline std::map<const void*, int> shared_asked;

template <typename... Args>
constexpr size_t bytes_of(const Args&...) {
  return (sizeof(Args) + ... + 0);
}

// Throws where a device would refuse to launch.
template <typename Kernel>
void check_launch(Kernel kernel, unsigned grid, unsigned threads, size_t shared_bytes, size_t argument_bytes) {
  const auto asked = shared_asked.find(reinterpret_cast<const void*>(kernel));
  const int allowed = asked == shared_asked.end() ? kSharedUnasked : std::max(kSharedUnasked, asked->second);
  const bool fits = grid > 0 && grid <= 0x7fffffffU && threads > 0 && threads <= kMostThreads &&
                    shared_bytes <= static_cast<size_t>(allowed) && argument_bytes <= kMostArgumentBytes;
  if (!fits) {
    throw std::runtime_error("host_cuda: a launch of " + std::to_string(grid) + " blocks of " +
                             std::to_string(threads) + " threads with " + std::to_string(shared_bytes) + " of " +
                             std::to_string(allowed) + " bytes and " + std::to_string(argument_bytes) +
                             " bytes of arguments, which no device takes");
  }
}

}  // namespace host_cuda

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, int attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > host_cuda::kMostShared) {
    return 1;
  }
  host_cuda::shared_asked[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

// One device, with the shared memory of an H100.
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int device) {
  *value = host_cuda::kMostShared;
  return device == 0 ? cudaSuccess : 1;
}

namespace host_cuda {

struct Block {
  // What nobody has written is NaN.
  Block(unsigned threads, size_t shared_bytes) : all(threads), dynamic(shared_bytes, 0xff), exchange(threads) {
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
  // A device promises no order.
  static std::mt19937 generator(7);
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0U);
  std::shuffle(order.begin(), order.end(), generator);
  for (const unsigned b : order) {
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
