// Tensors over the memory of a graph's results, which hold it (replay.h).
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/from_blob.h>

#include <mutex>
#include <unordered_map>

#include "aten.h"
#include "replay.h"

namespace fastvae {
namespace {

// Results that their caller owns, in bytes: whoever keeps a number of each step should not keep a graph with it.
constexpr int64_t kMostOwned = int64_t{1} << 20;

// Where memory begins that is under a lease, with how many tensors share it.
class LeasedPlaces {
 public:
  void add(const void* place) {
    const std::lock_guard<std::mutex> locked(mutex_);
    ++counts_[place];
  }
  void remove(const void* place) {
    const std::lock_guard<std::mutex> locked(mutex_);
    if (const auto found = counts_.find(place); --found->second == 0) {
      counts_.erase(found);
    }
  }
  bool has(const void* place) {
    const std::lock_guard<std::mutex> locked(mutex_);
    return counts_.count(place) != 0;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, int64_t> counts_;
};

// Never destroyed, as the graphs of the operators: at exit a tensor may die later, and there may be no driver any more.
LeasedPlaces& leased_places() {
  static LeasedPlaces& places = *new LeasedPlaces;
  return places;
}

at::Tensor under_lease(const at::Tensor& tensor, const std::shared_ptr<const void>& lease) {
  if (!tensor.defined()) {
    return tensor;
  }
  if (tensor.numel() == 0) {
    return aten::empty_like(tensor);
  }
  void* place = tensor.mutable_data_ptr();
  leased_places().add(place);
  return at::for_blob(place, tensor.sizes())
      .strides(tensor.strides())
      .deleter([lease](void* at) { leased_places().remove(at); })
      .options(tensor.options())
      .target_device(tensor.device())
      .make_tensor();
}

}  // namespace

bool is_under_lease(const at::Tensor& tensor) { return leased_places().has(place_of(tensor)); }

std::vector<at::Tensor> kept_results(const Replayed& run, size_t owned) {
  if (run.lease == nullptr) {
    return run.results;
  }
  std::vector<at::Tensor> found, to, from;
  for (const at::Tensor& result : run.results) {
    if (found.size() < owned && result.defined() && result.numel() > 0 && bytes_of(result) <= kMostOwned) {
      from.push_back(result);
      to.push_back(aten::empty_like(result));
      found.push_back(to.back());
    } else {
      found.push_back(under_lease(result, run.lease));
    }
  }
  if (!to.empty()) {
    at::_foreach_copy_(to, from);
  }
  return found;
}

}  // namespace fastvae
