// Numbers for every activation, and the switch over likelihoods, from the lists of math/: a new one needs no line here.
#pragma once

#include <vector>

#include "math/activations.h"
#include "math/element_heads.h"
#include "math/likelihoods.h"

namespace cases {

using namespace fastvae;

// One or more of a kind: with numbers of either size, of softplus with thresholds that are met within 10.
inline std::vector<ActivationSpec> examples(Activation kind) {
  static constexpr double kNumbers[][2] = {{0.0, 0.0}, {0.125, 0.0}, {1.5, 0.0}, {2.5, 20.0}, {2.0, 3.0}};
  static constexpr int kCounts[] = {0, 1, 1, 2, 2};
  std::vector<ActivationSpec> found;
  const auto try_all = [&](int count, bool (*takes)(double, double)) {
    for (size_t i = 0; i < std::size(kCounts); ++i) {
      if (kCounts[i] == count && takes(kNumbers[i][0], kNumbers[i][1])) {
        found.push_back({kind, kNumbers[i][0], kNumbers[i][1]});
      }
    }
  };
  switch (kind) {
#define CASE(KIND, ...)                                                                                  \
  case Activation::KIND:                                                                                 \
    try_all(math::Phi<Activation::KIND, double>::kNumbers, &math::Phi<Activation::KIND, double>::takes); \
    break;
    FASTVAE_ACTIVATION_KINDS(CASE)
#undef CASE
  }
  return found;
}

// The first example of every kind.
inline const std::vector<ActivationSpec>& activations() {
#define CASE(KIND, ...) examples(Activation::KIND).at(0),
  static const std::vector<ActivationSpec> all = {FASTVAE_ACTIVATION_KINDS(CASE)};
#undef CASE
  return all;
}

// use(Head<double>(spec)) for a likelihood of independent outputs.
template <typename Use>
auto with_head(const LikelihoodSpec& spec, const Use& use) {
  switch (spec.kind) {
#define CASE(KIND, Head) \
  case Likelihood::KIND: \
    return use(Head<double>(spec));
    FASTVAE_INDEPENDENT_HEADS(CASE)
#undef CASE
    case Likelihood::kCategorical:
      break;
  }
  return decltype(use(math::BernoulliHead<double>(spec))){};
}

// Every likelihood of elements, with numbers at which each of its branches is met, and how many outputs it has.
struct ElementExample {
  ElementHeadSpec spec;
  int outputs;
};

inline const std::vector<ElementExample>& element_heads() {
#define CASE(KIND, Rules) \
  {{ElementHead::KIND, {Rules<double>::kNumbers == 2 ? 5.0 : 0.7, 0.7}}, Rules<double>::kOutputs},
  static const std::vector<ElementExample> all = {FASTVAE_ELEMENT_HEADS(CASE)};
#undef CASE
  return all;
}

// use(Rules<double>(numbers)) of one.
template <typename Use>
void with_element_head(const ElementHeadSpec& spec, const Use& use) {
  switch (spec.kind) {
#define CASE(KIND, Rules)             \
  case ElementHead::KIND:             \
    use(Rules<double>(spec.numbers)); \
    break;
    FASTVAE_ELEMENT_HEADS(CASE)
#undef CASE
  }
}

}  // namespace cases
