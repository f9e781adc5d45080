// An activation by its words, "leaky_relu 0.2", in a network's text and at the rules of single layers.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "../kernels/math/activations.h"

namespace fastvae {

// Words: expect_numbers(count), number(index from 1), expect(condition, what) which raises.
template <typename Words>
ActivationSpec activation_of(const std::string& kind, const Words& words) {
  static constexpr std::pair<std::string_view, Activation> kPlain[] = {
      {"relu", Activation::kRelu}, {"tanh", Activation::kTanh}, {"sigmoid", Activation::kSigmoid},
      {"silu", Activation::kSilu}, {"gelu", Activation::kGelu}, {"gelu_tanh", Activation::kGeluTanh}};
  for (const auto& [name, plain] : kPlain) {
    if (kind == name) {
      words.expect_numbers(0);
      return {plain, 0.0, 0.0};
    }
  }
  if (kind == "leaky_relu") {
    words.expect_numbers(1);
    // phi' is read off h, whose sign a negative slope would turn.
    words.expect(words.number(1) >= 0.0, "expected a slope of at least 0");
    return {Activation::kLeakyRelu, words.number(1), 0.0};
  }
  if (kind == "elu") {
    words.expect_numbers(1);
    words.expect(words.number(1) > 0.0, "expected alpha > 0");
    return {Activation::kElu, words.number(1), 0.0};
  }
  words.expect(kind == "softplus", "unknown kind of layer");
  words.expect_numbers(2);
  words.expect(words.number(1) > 0.0, "expected beta > 0");
  const bool meets = words.number(2) >= math::kSoftplusMeets;
  return {meets ? Activation::kSoftplus : Activation::kSoftplusSharp, words.number(1), words.number(2)};
}

}  // namespace fastvae
