// Every entry of the library, the raw ones included, opens with an EntryGuard: below it ATen neither records graphs
// nor autocasts. What cannot be honoured there, forward-mode tangents, is refused instead of dropped.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <functional>
#include <initializer_list>

#include "check.h"

namespace fastvae {

inline void refuse_forward_mode(const char* op, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.defined() || !tensor._fw_grad(/*level=*/0).defined(), "fastvae::", op,
                              ": forward-mode differentiation is not supported and would give zeros; use the same "
                              "function of fastvae.reference");
}

class EntryGuard {
 public:
  EntryGuard(const char* op, std::initializer_list<std::reference_wrapper<const at::Tensor>> inputs)
      : device_(device_of(op, inputs.begin()->get())) {
    for (const at::Tensor& input : inputs) {
      refuse_forward_mode(op, input);
    }
  }

 private:
  // None in the place of a tensor arrives as an undefined one.
  static at::Device device_of(const char* op, const at::Tensor& first) {
    FASTVAE_CHECK_TYPE(first.defined(), op, "first tensor", "a tensor", "None");
    return first.device();
  }

  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  c10::impl::ExcludeDispatchKeyGuard below_autocast_{c10::autocast_dispatch_keyset};
  c10::DeviceGuard device_;
};

}  // namespace fastvae
