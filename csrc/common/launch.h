// Runs a kernel of kernels.h where the tensors live: split over torch's threads on a CPU, on the current stream of a
// CUDA device. Also the switch over the two floating types.
//
// A build that emulates CUDA (FASTVAE_EMULATE_CUDA, docs/kernels.md) takes CPU tensors for a device's: its glue makes
// the choices that it makes on a GPU, and the CUDA kernels run on the CPU.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "../kernels/kernels.h"
#ifdef FASTVAE_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastvae {

// Elements below which splitting costs more than it saves (a wake-up is about 5 us).
constexpr int64_t kGrain = 8192;

// Whether the CUDA kernels run on this device's tensors: the one question by which the glue chooses between a CPU's way
// and a GPU's. What is_cpu and is_cuda ask is where the memory lies.
#ifdef FASTVAE_EMULATE_CUDA
inline bool runs_cuda(at::Device device) { return device.is_cpu(); }
#else
inline bool runs_cuda(at::Device device) { return device.is_cuda(); }
#endif
inline bool runs_cuda(const at::Tensor& tensor) { return runs_cuda(tensor.device()); }

#if defined(FASTVAE_WITH_CUDA) || defined(FASTVAE_EMULATE_CUDA)
#define FASTVAE_HAS_CUDA_KERNELS
inline Stream current_stream([[maybe_unused]] at::Device device) {
#ifdef FASTVAE_WITH_CUDA
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
#else
  return nullptr;
#endif
}
#define FASTVAE_LAUNCH_CUDA(KERNEL, DEVICE, ARGS)                     \
  if (::fastvae::runs_cuda(DEVICE)) {                                 \
    ::fastvae::cuda::KERNEL(ARGS, ::fastvae::current_stream(DEVICE)); \
  } else  // NOLINT
#else
#define FASTVAE_LAUNCH_CUDA(KERNEL, DEVICE, ARGS)
#endif

// COUNT: the size of the kernel's index; WIDTH: elements behind one index.
#define FASTVAE_LAUNCH_CPU(KERNEL, ARGS, COUNT, WIDTH)                                   \
  at::parallel_for(0, COUNT, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, WIDTH)), \
                   [&](int64_t begin, int64_t end) { ::fastvae::cpu::KERNEL(ARGS, begin, end); })

#define FASTVAE_LAUNCH(KERNEL, DEVICE, ARGS, COUNT, WIDTH)                                          \
  do {                                                                                              \
    if ((COUNT) > 0) {                                                                              \
      FASTVAE_LAUNCH_CUDA(KERNEL, DEVICE, ARGS) { FASTVAE_LAUNCH_CPU(KERNEL, ARGS, COUNT, WIDTH); } \
    }                                                                                               \
  } while (false)

// Calls BODY with `scalar_t` defined as the tensor's type, which the entry has checked.
#define FASTVAE_DISPATCH(TENSOR, ...)           \
  do {                                          \
    if ((TENSOR).scalar_type() == at::kFloat) { \
      using scalar_t = float;                   \
      __VA_ARGS__                               \
    } else {                                    \
      using scalar_t = double;                  \
      __VA_ARGS__                               \
    }                                           \
  } while (false)

template <typename T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

template <typename T>
T* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

}  // namespace fastvae
