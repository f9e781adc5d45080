// An activation by its words, "leaky_relu 0.2", in a network's text and at the rules of single layers.
#pragma once

#include <string>

#include "../kernels/math/activations.h"

namespace fastvae {

// Words: expect_numbers(count), number(index from 1), expect(condition, what) which raises.
template <typename Words>
ActivationSpec activation_of(const std::string& name, const Words& words) {
  const char* fault = "unknown kind of layer";
#define FASTVAE_TRY(KIND, ...)                                       \
  {                                                                  \
    using Phi = math::Phi<Activation::KIND, double>;                 \
    if (name == Phi::kName) {                                        \
      words.expect_numbers(Phi::kNumbers);                           \
      const double first = Phi::kNumbers > 0 ? words.number(1) : 0;  \
      const double second = Phi::kNumbers > 1 ? words.number(2) : 0; \
      if (Phi::takes(first, second)) {                               \
        return {Activation::KIND, first, second};                    \
      }                                                              \
      fault = Phi::kExpected;                                        \
    }                                                                \
  }
  FASTVAE_ACTIVATION_KINDS(FASTVAE_TRY)
#undef FASTVAE_TRY
  words.expect(false, fault);
  return {};
}

}  // namespace fastvae
