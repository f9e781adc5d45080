// Every entry of the library, the raw ones included, opens with an EntryGuard: below it ATen neither records graphs
// nor autocasts. What cannot be honoured there, forward-mode tangents, was refused where it was registered
// (operator.h).
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "check.h"

namespace fastvae {

class EntryGuard {
 public:
  EntryGuard(const char* op, const at::Tensor& first) : device_(device_of(op, first)) {}

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
