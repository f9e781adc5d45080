// Memory that is used again. A large block that malloc takes from the system is handed over page by page, zeroed, as it
// is first touched, and goes back when it is freed: in a loop over tiles that costs as much as the products do.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

namespace fastvae {

class Pool;

// Between enter and leave, recycled() on this thread takes the memory of tensors of recycled() that have died; the
// system gets it back with the end of the object.
class Recycling {
 public:
  Recycling();
  void enter() const;
  void leave() const;

 private:
  std::shared_ptr<Pool> pool_;
};

// Uninitialised, as of at::empty.
at::Tensor recycled(at::IntArrayRef sizes, const at::TensorOptions& options);

// The same without a Recycling, for what every training step takes and gives back: gradients and activations. So many
// bytes of it stay with the process while they are not used.
constexpr size_t kReusedBytes = size_t{256} << 20;
at::Tensor reused(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace fastvae
