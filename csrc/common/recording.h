// What a function of tensors calls, once for all: a CUDA graph. In a build without CUDA, as where it is emulated, the
// same calls again of the same memory. And what has to be known of a GPU to make one.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

namespace fastvae {

// It looks at no number of its inputs, changes none of them, and owns what it captures.
using TensorFunction = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

class Recording {
 public:
  Recording();
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  // The results, which every replay overwrites. On a GPU no kernel runs yet.
  std::vector<at::Tensor> capture(const TensorFunction& function, const std::vector<at::Tensor>& inputs);
  // On the current stream; the inputs lie where those of the capture lay.
  void replay(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& results);

 private:
  struct Graph;
  std::unique_ptr<Graph> graph_;
};

// Of the current device: bytes of its memory, bytes that PyTorch's allocator has taken of it, whether somebody captures
// on the current stream, and which that is.
int64_t memory_of_gpu();
int64_t reserved_bytes();
bool is_capturing();
int64_t stream_id();

}  // namespace fastvae
