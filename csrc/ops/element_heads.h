// Likelihoods of elements at outputs that somebody has (kernels/math/element_heads.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../kernels/math/element_heads.h"

namespace fastvae {

struct ElementLikelihood {
  ElementHeadSpec spec;
  int64_t outputs = 1;   // of an element
  bool is_head = false;  // whether a Network has it, too, for its last layer
};

// Of "NAME NUMBER ...", as Likelihood.element_spec has it; none if no likelihood is called so, ValueError for numbers
// that it does not take.
std::optional<ElementLikelihood> find_element_likelihood(const char* op, std::string_view text);

// sum of log p(x | y) into log_prob [B], for y [B, outputs, size] and x [B, size] in the order of memory. Where
// residual is defined, the gradient to y into it.
void element_terms(const ElementLikelihood& likelihood, const at::Tensor& y, const at::Tensor& x,
                   const at::Tensor& weight, const at::Tensor& residual, const at::Tensor& log_prob);

}  // namespace fastvae
