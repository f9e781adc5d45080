// Just enough of CUDA to execute csrc/kernels/cuda/*.cu on a CPU, in tests/cpp/test_cuda_on_host.cpp (CMakeLists.txt)
// and behind a Python extension that emulates CUDA (setup.py); included in front of those files. Blocks take turns in
// any order, shared memory begins as NaN, and what no device would launch throws (host_blocks.h). cuda/launch.cuh says
// what a kernel may use. Says nothing about speed.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>

#include "host_blocks.h"
#include "moved_bytes.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static_assert(false, "FASTVAE_SHARED declares what is in shared memory (launch.cuh)");

// Few blocks, so that small arrays take several strides over the grid; two warps, so that they have to meet. With
// Python in front threads as on a device.
#ifndef FASTVAE_CUDA_THREADS
#define FASTVAE_CUDA_THREADS 64
#endif
#ifndef FASTVAE_HOST_BLOCKS
#define FASTVAE_HOST_BLOCKS 3
#endif
#define FASTVAE_CUDA_MAX_BLOCKS (host_cuda::note != nullptr ? 4096 : FASTVAE_HOST_BLOCKS)
#define FASTVAE_SHARED(TYPE, NAME, SIZES) \
  using NAME##_array = TYPE SIZES;        \
  static const char NAME##_key = 0;       \
  NAME##_array& NAME = *static_cast<NAME##_array*>(host_cuda::blocks.shared(&NAME##_key, sizeof(NAME##_array)))
#define FASTVAE_DYNAMIC_SHARED(TYPE, NAME) TYPE* const NAME = static_cast<TYPE*>(host_cuda::blocks.shared(nullptr, 0))
#define FASTVAE_CUDA_LAUNCH(KERNEL, GRID, BLOCK, SHARED, STREAM, ...) \
  host_cuda::launch(KERNEL, GRID, BLOCK, SHARED, __VA_ARGS__)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid argument";
}

namespace host_cuda {

// Of an H100, as of most devices.
constexpr unsigned kMostThreads = 1024;
constexpr int kMostShared = 227 * 1024, kSharedUnasked = 48 * 1024;
constexpr size_t kMostArgumentBytes = 4096;

// What is known of a kernel, by its address.
struct Known {
  int shared_asked = 0;  // bytes of dynamic shared memory
  int64_t launches = 0;
};
inline std::map<const void*, Known> kernels;

// A launch as a device would get it.
struct Launch {
  const void* kernel;
  unsigned blocks, threads;
  size_t shared_bytes;    // dynamic
  int64_t moved_bytes;    // that it cannot do without
  std::string arguments;  // their bytes, what lies between members zero
};
// Who is told of launches, or null. While somebody is, grids are as large as a device's.
inline void (*note)(Launch&&) = nullptr;
inline std::mutex mutex;  // of the above and of `blocks`
// A process that forks while another of its threads launches leaves its child no locked mutex.
inline const int at_fork = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });

template <typename Kernel>
const void* address_of(Kernel kernel) {
  return reinterpret_cast<const void*>(kernel);
}

// Throws where a device would refuse to launch.
template <typename Kernel>
void check_launch(Kernel kernel, unsigned grid, unsigned threads, size_t shared_bytes, size_t argument_bytes) {
  const int allowed = std::max(kSharedUnasked, kernels[address_of(kernel)].shared_asked);
  const bool fits = grid > 0 && grid <= 0x7fffffffU && threads > 0 && threads <= kMostThreads &&
                    shared_bytes <= static_cast<size_t>(allowed) && argument_bytes <= kMostArgumentBytes;
  if (!fits) {
    throw std::runtime_error("host_cuda: a launch of " + std::to_string(grid) + " blocks of " +
                             std::to_string(threads) + " threads with " + std::to_string(shared_bytes) + " of " +
                             std::to_string(allowed) + " bytes and " + std::to_string(argument_bytes) +
                             " bytes of arguments, which no device takes");
  }
}

template <typename T>
void append_bytes(std::string& text, T value) {
#if __has_builtin(__builtin_clear_padding)
  __builtin_clear_padding(&value);
  if constexpr (requires { value.network.likelihood; }) {
    __builtin_clear_padding(&value.network.likelihood);  // which GCC 12 overlooks behind arrays of structures
  }
#endif
  text.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

// Of kernels that are no product's, nothing is known.
template <typename... Args>
int64_t moved_bytes_of(const Args&... args) {
  if constexpr (requires { fastvae::moved_bytes(args...); }) {
    return fastvae::moved_bytes(args...);
  } else {
    return 0;
  }
}

template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), unsigned grid, unsigned threads, size_t shared_bytes, const Args&... args) {
  const std::lock_guard<std::mutex> lock(mutex);
  check_launch(kernel, grid, threads, shared_bytes, (sizeof(Parameters) + ... + 0));
  Known& known = kernels[address_of(kernel)];
  ++known.launches;
  if (note != nullptr) {
    std::string arguments;
    (append_bytes<Parameters>(arguments, args), ...);
    note({address_of(kernel), grid, threads, shared_bytes, moved_bytes_of(args...), std::move(arguments)});
  }
  const auto call = [&] { kernel(args...); };
  blocks.run(
      grid, threads, shared_bytes, known.shared_asked > 0 ? kMostShared : kSharedUnasked,
      [](const void* what) { (*static_cast<const decltype(call)*>(what))(); }, &call);
}

}  // namespace host_cuda

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, int attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > host_cuda::kMostShared) {
    return 1;
  }
  const std::lock_guard<std::mutex> lock(host_cuda::mutex);
  host_cuda::kernels[host_cuda::address_of(kernel)].shared_asked = value;
  return cudaSuccess;
}

// One device, with the shared memory of an H100: number 0, or the CPU that stands for it, which has none.
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int device) {
  *value = host_cuda::kMostShared;
  return device <= 0 ? cudaSuccess : 1;
}

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  host_cuda::blocks.meet_block(at.line());
}
inline void __syncwarp(unsigned = 0xffffffffU, std::source_location at = std::source_location::current()) {
  host_cuda::blocks.meet_warp(at.line());
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane, std::source_location at = std::source_location::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const unsigned other = threadIdx.x % host_cuda::kWarp ^ static_cast<unsigned>(lane);
  bits = host_cuda::blocks.exchange(at.line(), bits, other);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
