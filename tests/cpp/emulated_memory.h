// What stands for a device's memory where CUDA is emulated: PyTorch's tensors on the CPU. On a device a launch is over
// before its kernel runs, so nothing that it is called with may point to the host's memory, which is gone by then; and
// memory that died is another's by the time that a graph is replayed. So allocations are known, and poisoned as they
// end.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <string>

namespace fastvae {

class DeviceMemory final : public c10::Allocator {
 public:
  // From now on all memory of tensors on the CPU is known.
  static void install() { c10::SetCPUAllocator(&one(), /*priority=*/100); }

  static DeviceMemory& one() {
    static DeviceMemory& memory = *new DeviceMemory(c10::GetCPUAllocator());  // tensors may outlive every static object
    return memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr inner = inner_->allocate(bytes);
    void* const begin = inner.release_context();
    if (begin != nullptr) {
      const std::lock_guard<std::mutex> lock(mutex_);
      alive_[reinterpret_cast<uintptr_t>(begin)] = bytes;
    }
    return {begin, begin, &DeviceMemory::end, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &DeviceMemory::end; }

  void copy_data(void* to, const void* from, size_t bytes) const override { inner_->copy_data(to, from, bytes); }

  // Of the words among a launch's arguments that are addresses, how many are not of a tensor's memory that lives.
  int64_t strangers(const std::string& arguments) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t found = 0;
    for (size_t at = 0; at + sizeof(uintptr_t) <= arguments.size(); at += sizeof(uintptr_t)) {
      uintptr_t word = 0;
      std::memcpy(&word, arguments.data() + at, sizeof(word));
      if (word >> 32 != 0 && word >> 47 == 0) {
        const auto after = alive_.upper_bound(word);
        // What has no elements may lie where the memory ends.
        const bool lives = after != alive_.begin() && word <= std::prev(after)->first + std::prev(after)->second;
        found += !lives && is_mapped(word) ? 1 : 0;
      }
    }
    return found;
  }

 private:
  // Two numbers of 32 bits may look like an address; that one of them is one is not likely.
  static bool is_mapped(uintptr_t word) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    unsigned char resident = 0;
    return mincore(reinterpret_cast<void*>(word / page * page), 1, &resident) == 0;
  }

  explicit DeviceMemory(c10::Allocator* inner) : inner_(inner) {}

  static void end(void* begin) {
    if (begin == nullptr) {
      return;
    }
    DeviceMemory& memory = one();
    size_t bytes = 0;
    {
      const std::lock_guard<std::mutex> lock(memory.mutex_);
      const auto found = memory.alive_.find(reinterpret_cast<uintptr_t>(begin));
      bytes = found->second;
      memory.alive_.erase(found);
    }
    std::memset(begin, 0xff, bytes);  // NaN in every floating dtype
    memory.inner_->raw_deallocate(begin);
  }

  c10::Allocator* inner_;
  std::mutex mutex_;
  std::map<uintptr_t, size_t> alive_;
};

}  // namespace fastvae
