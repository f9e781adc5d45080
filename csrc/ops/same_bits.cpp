// Whether weights are what they were: TracIn asks at every call, so every core compares its share.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../common/guard.h"
#include "ops.h"

namespace fastvae {
namespace {

constexpr int64_t kShare = int64_t{1} << 17;  // bytes that a core compares at a time

struct Bytes {
  const char* a;
  const char* b;
  size_t count;
};

bool in_memory(const at::Tensor& tensor) {
  return tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.is_contiguous() && !tensor.is_neg() &&
         !tensor.is_conj();
}

}  // namespace

bool same_bits(at::TensorList a, at::TensorList b) {
  constexpr const char* op = "same_bits";
  FASTVAE_CHECK_VALUE(a.size() == b.size(), op, "b", c10::str(a.size(), " tensors as a"), b.size());
  std::vector<Bytes> shares;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].scalar_type() != b[i].scalar_type() || a[i].sizes() != b[i].sizes() || a[i].device() != b[i].device()) {
      return false;
    }
    for (const auto& [name, tensor] : {std::pair("a", a[i]), std::pair("b", b[i])}) {
      if (tensor.layout() == at::kStrided) {
        check_storage(op, name, tensor);
      }
    }
    if (!in_memory(a[i]) || !in_memory(b[i])) {
      if (!a[i].equal(b[i])) {
        return false;
      }
      continue;
    }
    const auto* const of_a = static_cast<const char*>(a[i].const_data_ptr());
    const auto* const of_b = static_cast<const char*>(b[i].const_data_ptr());
    const auto bytes = static_cast<int64_t>(a[i].nbytes());
    for (int64_t first = 0; first < bytes; first += kShare) {
      shares.push_back({of_a + first, of_b + first, static_cast<size_t>(std::min(kShare, bytes - first))});
    }
  }
  std::atomic<bool> same{true};
  at::parallel_for(0, static_cast<int64_t>(shares.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && same.load(std::memory_order_relaxed); ++i) {
      const Bytes& share = shares[static_cast<size_t>(i)];
      if (std::memcmp(share.a, share.b, share.count) != 0) {
        same.store(false, std::memory_order_relaxed);
      }
    }
  });
  return same.load();
}

}  // namespace fastvae
