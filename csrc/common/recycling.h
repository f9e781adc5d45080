// Memory that is used again. A large block that malloc takes from the system is handed over page by page, zeroed, as it
// is first touched, and goes back when it is freed: in a loop over tiles that costs as much as the products do.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace fastvae {

// Between enter and leave, recycled() on this thread takes the memory of tensors of recycled() that have died; the
// system gets it back with the end of the object.
class Recycling {
 public:
  Recycling() = default;
  Recycling(const Recycling&) = delete;
  Recycling& operator=(const Recycling&) = delete;

  void enter() {
    before_ = current();
    current() = this;
  }
  void leave() { current() = before_; }

  static Recycling*& current() {
    static thread_local Recycling* innermost = nullptr;
    return innermost;
  }

  at::Tensor tensor(at::IntArrayRef sizes, const at::TensorOptions& options) const {
    const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
    const auto block = std::make_shared<Block>(pool_->take(bytes));
    const std::weak_ptr<Pool> pool = pool_;
    const auto give_back = [block, pool](void*) {
      if (const std::shared_ptr<Pool> alive = pool.lock()) {
        alive->give(std::move(*block));
      }
    };
    return at::from_blob(block->memory.get(), sizes, give_back, options);
  }

 private:
  struct Block {
    size_t bytes;
    c10::DataPtr memory;
  };

  class Pool {
   public:
    // The smallest free block that holds so many bytes and is not much too large, or a new one.
    Block take(size_t bytes) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.lower_bound(bytes);
      if (found == free_.end() || found->first > 2 * bytes) {
        return {bytes, fresh(bytes)};
      }
      Block block{found->first, std::move(found->second)};
      free_.erase(found);
      return block;
    }

    // A tensor may die on any thread.
    void give(Block block) {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.emplace(block.bytes, std::move(block.memory));
    }

   private:
    static c10::DataPtr fresh(size_t bytes) {
      c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
#ifdef __linux__
      // Large pages where the system has them for the asking; where it has none, nothing is lost.
      constexpr uintptr_t kHuge = uintptr_t{1} << 21;
      const auto first = (reinterpret_cast<uintptr_t>(memory.get()) + kHuge - 1) / kHuge * kHuge;
      const auto last = (reinterpret_cast<uintptr_t>(memory.get()) + bytes) / kHuge * kHuge;
      if (first < last) {
        madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
      }
#endif
      return memory;
    }

    std::mutex mutex_;
    std::multimap<size_t, c10::DataPtr> free_;
  };

  std::shared_ptr<Pool> pool_ = std::make_shared<Pool>();
  Recycling* before_ = nullptr;
};

// Uninitialised, as of at::empty.
inline at::Tensor recycled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const bool on_cpu = options.device().is_cpu();
  const Recycling* const pool = on_cpu ? Recycling::current() : nullptr;
  return pool == nullptr ? at::empty(sizes, options) : pool->tensor(sizes, options);
}

}  // namespace fastvae
