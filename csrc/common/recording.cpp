#include "recording.h"

#ifdef FASTVAE_WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <unordered_map>
#endif

namespace fastvae {

#ifdef FASTVAE_WITH_CUDA

namespace {

// A stream of this thread's own, and always the same: each has a workspace of cuBLAS. PyTorch hands out its streams
// again and again; what another thread did on this one would be captured, too. Few use those of high priority.
c10::cuda::CUDAStream stream_for_captures(c10::DeviceIndex device) {
  thread_local std::unordered_map<int, c10::cuda::CUDAStream> streams;
  auto found = streams.find(device);
  if (found == streams.end()) {
    found = streams.emplace(device, c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device)).first;
  }
  return found->second;
}

}  // namespace

struct Recording::Graph {
  at::cuda::CUDAGraph of_cuda;
};

std::vector<at::Tensor> Recording::capture(const TensorFunction& function, const std::vector<at::Tensor>& inputs) {
  const c10::DeviceIndex device = c10::cuda::current_device();
  const c10::cuda::CUDAStreamGuard aside(stream_for_captures(device));
  const c10::MempoolId_t pool = at::cuda::graph_pool_handle();
  graph_->of_cuda.capture_begin(pool, cudaStreamCaptureModeThreadLocal);
  std::vector<at::Tensor> results;
  try {
    results = function(inputs);
  } catch (...) {
    try {
      graph_->of_cuda.capture_end();
    } catch (const c10::Error&) {
      // What a capture that has become invalid leaves to be done.
      c10::cuda::CUDACachingAllocator::endAllocateToPool(device, pool);
    }
    throw;
  }
  graph_->of_cuda.capture_end();
  return results;
}

void Recording::replay(const std::vector<at::Tensor>& /*inputs*/, const std::vector<at::Tensor>& /*results*/) {
  graph_->of_cuda.replay();
}

int64_t memory_of_gpu() {
  thread_local std::unordered_map<int, int64_t> known;
  const c10::DeviceIndex device = c10::cuda::current_device();
  auto found = known.find(device);
  if (found == known.end()) {
    size_t free = 0, total = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    found = known.emplace(device, static_cast<int64_t>(total)).first;
  }
  return found->second;
}

int64_t reserved_bytes() {
  constexpr size_t kAggregate = 0;
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(c10::cuda::current_device());
  return stats.reserved_bytes[kAggregate].current;
}

bool is_capturing() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }

int64_t stream_id() { return static_cast<int64_t>(c10::cuda::getCurrentCUDAStream().id()); }

#else

struct Recording::Graph {
  TensorFunction function;
};

std::vector<at::Tensor> Recording::capture(const TensorFunction& function, const std::vector<at::Tensor>& inputs) {
  graph_->function = function;
  return function(inputs);
}

void Recording::replay(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& results) {
  // Of numbers that an expanded result repeats, one each.
  const auto once = [](at::Tensor result) {
    for (int64_t axis = 0; axis < result.dim(); ++axis) {
      result = result.stride(axis) == 0 && result.size(axis) > 1 ? result.narrow(axis, 0, 1) : result;
    }
    return result;
  };
  const std::vector<at::Tensor> again = graph_->function(inputs);
  for (size_t at = 0; at < results.size(); ++at) {
    if (results[at].defined() && !results[at].is_same(again[at])) {
      once(results[at]).copy_(once(again[at]));
    }
  }
}

int64_t memory_of_gpu() { return int64_t{8} << 30; }

int64_t reserved_bytes() { return 0; }

bool is_capturing() { return false; }

int64_t stream_id() { return 0; }

#endif

Recording::Recording() : graph_(std::make_unique<Graph>()) {}
Recording::~Recording() = default;

}  // namespace fastvae
