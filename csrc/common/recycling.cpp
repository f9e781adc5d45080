#include "recycling.h"

#include <c10/core/CPUAllocator.h>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include "aten.h"

namespace fastvae {
namespace {

// One for all pools, and a fork waits for it: a loader's worker must not find it held by a thread that it does not
// have. Never destroyed: tensors may outlive every static object.
std::mutex& pools_mutex() {
  static std::mutex& mutex = *new std::mutex;
  return mutex;
}

#ifndef _WIN32
[[maybe_unused]] const int kForksWait =
    pthread_atfork([] { pools_mutex().lock(); }, [] { pools_mutex().unlock(); }, [] { pools_mutex().unlock(); });
#endif

}  // namespace

// Blocks of CPU memory that nobody uses. Tensors may die on any thread, and after the pool.
class Pool : public std::enable_shared_from_this<Pool> {
 public:
  // Of what is free, so many bytes are kept.
  explicit Pool(size_t most_bytes = std::numeric_limits<size_t>::max()) : most_bytes_(most_bytes) {}

  // Uninitialised, in the smallest free block that is not much too large, or in a new one.
  at::Tensor tensor(at::IntArrayRef sizes, const at::TensorOptions& options) {
    const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
    const auto block = std::make_shared<Block>(take(bytes));
    const auto give_back = [block, pool = weak_from_this()](void*) {
      if (const std::shared_ptr<Pool> alive = pool.lock()) {
        alive->give(std::move(*block));
      }
    };
    return aten::from_blob(block->memory.get(), sizes, give_back, options);
  }

 private:
  struct Block {
    size_t bytes;
    c10::DataPtr memory;
  };

  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(pools_mutex());
      const auto found = free_.lower_bound(bytes);
      if (found != free_.end() && found->first <= 2 * bytes) {
        Block block{found->first, std::move(found->second)};
        free_.erase(found);
        free_bytes_ -= block.bytes;
        return block;
      }
    }
    return {bytes, fresh(bytes)};
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(pools_mutex());
    if (block.bytes <= most_bytes_ && free_bytes_ > most_bytes_ - block.bytes) {
      free_.clear();  // what is used again comes back soon
      free_bytes_ = 0;
    }
    if (block.bytes <= most_bytes_) {
      free_bytes_ += block.bytes;
      // Before others of its size: it is taken first, while the caches still have it.
      free_.emplace_hint(free_.lower_bound(block.bytes), block.bytes, std::move(block.memory));
    }
  }

  static c10::DataPtr fresh(size_t bytes) {
    c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
#ifdef __linux__
    // Large pages where the system has them for the asking; where it has none, nothing is lost.
    constexpr uintptr_t kHuge = uintptr_t{1} << 21;
    const auto begin = reinterpret_cast<uintptr_t>(memory.get());
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + bytes) / kHuge * kHuge;
    if (first < last) {
      madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
    }
#endif
    return memory;
  }

  size_t most_bytes_;
  size_t free_bytes_ = 0;
  std::multimap<size_t, c10::DataPtr> free_;
};

namespace {

// Of this thread, the innermost last.
std::vector<std::shared_ptr<Pool>>& pools() {
  static thread_local std::vector<std::shared_ptr<Pool>> entered;
  return entered;
}

}  // namespace

Recycling::Recycling() : pool_(std::make_shared<Pool>()) {}

void Recycling::enter() const { pools().push_back(pool_); }

void Recycling::leave() const {
  std::vector<std::shared_ptr<Pool>>& all = pools();
  const auto mine = std::find(all.rbegin(), all.rend(), pool_);
  if (mine != all.rend()) {
    all.erase(std::prev(mine.base()));
  }
}

at::Tensor reused(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  // malloc has smaller blocks at hand.
  constexpr int64_t kSmall = int64_t{1} << 16;
  if (!options.device().is_cpu() || bytes < kSmall) {
    return aten::empty(sizes, options);
  }
  // Never destroyed: tensors may outlive every static object.
  static const auto* const pool = new std::shared_ptr<Pool>(std::make_shared<Pool>(kReusedBytes));
  return (*pool)->tensor(sizes, options);
}

at::Tensor recycled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu() || pools().empty()) {
    return aten::empty(sizes, options);
  }
  return pools().back()->tensor(sizes, options);
}

}  // namespace fastvae
