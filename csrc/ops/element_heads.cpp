// A likelihood at a network's output, as the sweeps in Python use it: its values and residuals, and its curvature
// (kernels/math/element_heads.h). Check, allocate, launch.
#include "element_heads.h"

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/operator.h"
#include "../network/words.h"

namespace fastvae {

std::optional<ElementLikelihood> find_element_likelihood(const char* op, std::string_view text) {
  const std::vector<std::string> words = split(text, ' ');
  std::optional<ElementLikelihood> found;
  const auto try_one = [&](ElementHead kind, const char* name, int numbers, int outputs, bool is_head) {
    if (words.size() != static_cast<size_t>(numbers) + 1 || words[0] != name) {
      return;
    }
    found = ElementLikelihood{{kind}, outputs, is_head};
    for (int i = 0; i < numbers; ++i) {
      found->spec.numbers[i] = to_number(op, "likelihood", words[i + 1]);
      FASTVAE_CHECK_VALUE(found->spec.numbers[i] > 0.0, op, "likelihood", "a number > 0", found->spec.numbers[i]);
    }
  };
#define FASTVAE_TRY(KIND, Rules)                                                                     \
  try_one(ElementHead::KIND, Rules<double>::kName, Rules<double>::kNumbers, Rules<double>::kOutputs, \
          Rules<double>::kIsHead);
  FASTVAE_ELEMENT_HEADS(FASTVAE_TRY)
#undef FASTVAE_TRY
  return found;
}

void element_terms(const ElementLikelihood& likelihood, const at::Tensor& y, const at::Tensor& x,
                   const at::Tensor& weight, const at::Tensor& residual, const at::Tensor& log_prob) {
  const int64_t samples = y.size(0), size = samples == 0 ? 0 : x.numel() / samples;
  const int64_t chunks = element_head_chunks(size);
  const bool apart = runs_cuda(y) && chunks > 1;
  const at::Tensor partial = apart ? aten::empty({samples * chunks}, y.options()) : at::Tensor();
  FASTVAE_DISPATCH(y, {
    const ElementHeadResidual<scalar_t> args{y.const_data_ptr<scalar_t>(),
                                             x.const_data_ptr<scalar_t>(),
                                             data_or_null<scalar_t>(weight),
                                             mutable_data_or_null<scalar_t>(residual),
                                             log_prob.mutable_data_ptr<scalar_t>(),
                                             samples,
                                             size,
                                             likelihood.spec,
                                             mutable_data_or_null<scalar_t>(partial)};
    FASTVAE_LAUNCH(element_head_residual, y.device(), args, samples, size * likelihood.outputs);
  });
}

namespace {

ElementLikelihood read_likelihood(const char* op, std::string_view text) {
  const std::optional<ElementLikelihood> found = find_element_likelihood(op, text);
  FASTVAE_CHECK_VALUE(found.has_value(), op, "likelihood", "the text of a likelihood that has kernels",
                      "'" + std::string(text) + "'");
  return *found;
}

// y, x and the weight in one order: as they lie where they lie alike, else each sample's elements one after the other.
struct Call {
  Call(const char* op, const at::Tensor& y_, const at::Tensor& x_, const std::optional<at::Tensor>& weight_,
       std::string_view text)
      : likelihood(read_likelihood(op, text)), y(y_), x(x_), weight(weight_.value_or(at::Tensor())) {
    check_floating(op, "y", y);
    check_like(op, "x", x, y, "y");
    FASTVAE_CHECK_VALUE(y.dim() >= 2, op, "y", "shape [B, ...]", describe(y));
    FASTVAE_CHECK_VALUE(x.dim() > 0 && x.size(0) == y.size(0) && x.numel() * likelihood.outputs == y.numel(), op, "x",
                        c10::str(y.size(0), " samples of ", y.numel() / std::max<int64_t>(1, y.size(0)), " / ",
                                 likelihood.outputs, " elements"),
                        describe(x));
    if (weight.defined()) {
      check_like(op, "weight", weight, y, "y");
      check_sizes(op, "weight", weight, x.sizes());
    }
    const bool alike = likelihood.outputs == 1 && y.is_non_overlapping_and_dense() && y.strides() == x.strides() &&
                       y.sizes() == x.sizes() && (!weight.defined() || weight.strides() == x.strides()) &&
                       (y.size(0) < 2 || y.stride(0) == y.numel() / y.size(0));
    if (!alike) {
      y = y.contiguous();
      x = x.contiguous();
      weight = weight.defined() ? weight.contiguous() : weight;
    }
  }
  // A tensor of y's shape, in its order.
  at::Tensor ordered(const char* op, const char* argument, const at::Tensor& tensor) const {
    check_like(op, argument, tensor, y, "y");
    check_sizes(op, argument, tensor, y.sizes());
    return tensor.strides() == y.strides() ? tensor : aten::empty_like(y).copy_(tensor);
  }
  int64_t samples() const { return y.size(0); }
  int64_t size() const { return samples() == 0 ? 0 : x.numel() / samples(); }

  ElementLikelihood likelihood;
  at::Tensor y, x, weight;
};

// sum of w log p(x | y) [B], of counts relative to that at their own mean; its gradient to y, empty if not wanted.
std::tuple<at::Tensor, at::Tensor> element_head(const at::Tensor& y, const at::Tensor& x,
                                                const std::optional<at::Tensor>& weight, std::string_view likelihood,
                                                bool wants_residual) {
  constexpr const char* op = "element_head";
  const EntryGuard guard(op, y);
  const Call call(op, y, x, weight, likelihood);
  at::Tensor log_prob = aten::empty({call.samples()}, y.options());
  at::Tensor residual = wants_residual ? aten::empty_like(call.y) : aten::empty({0}, y.options());
  element_terms(call.likelihood, call.y, call.x, call.weight, wants_residual ? residual : at::Tensor(), log_prob);
  return {log_prob, residual};
}

// The gradient to y of <dot, residual> + <cotangent, log_prob>: w S dot + cotangent residual.
at::Tensor element_head_adjoint(const at::Tensor& y, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                const at::Tensor& dot, const std::optional<at::Tensor>& residual,
                                const std::optional<at::Tensor>& cotangent, std::string_view likelihood) {
  constexpr const char* op = "element_head_adjoint";
  const EntryGuard guard(op, y);
  const Call call(op, y, x, weight, likelihood);
  FASTVAE_CHECK_VALUE(residual.has_value() || !cotangent.has_value(), op, "residual", "a tensor beside a cotangent",
                      "None");
  const at::Tensor along = call.ordered(op, "dot", dot);
  const at::Tensor r = cotangent.has_value() ? call.ordered(op, "residual", *residual) : at::Tensor();
  at::Tensor c;
  if (cotangent.has_value()) {
    check_like(op, "cotangent", *cotangent, y, "y");
    check_sizes(op, "cotangent", *cotangent, y.sizes().slice(0, 1));
    c = cotangent->contiguous();
  }
  at::Tensor out = aten::empty_like(call.y);
  FASTVAE_DISPATCH(y, {
    const ElementHeadTangent<scalar_t> args{call.y.const_data_ptr<scalar_t>(),
                                            call.x.const_data_ptr<scalar_t>(),
                                            data_or_null<scalar_t>(call.weight),
                                            along.const_data_ptr<scalar_t>(),
                                            data_or_null<scalar_t>(r),
                                            data_or_null<scalar_t>(c),
                                            out.mutable_data_ptr<scalar_t>(),
                                            call.samples(),
                                            call.size(),
                                            call.likelihood.spec};
    FASTVAE_LAUNCH(element_head_tangent, y.device(), args, args.samples, call.y.numel() / args.samples);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae_internal, m) {
  const auto no_gradient = [] { return refuses_gradient("fastvae::element_head: what sweeps call has no gradient"); };
  define_operator<&element_head>(
      m, "element_head(Tensor y, Tensor x, Tensor? weight, str likelihood, bool wants_residual) -> (Tensor, Tensor)",
      no_gradient());
  define_operator<&element_head_adjoint>(
      m,
      "element_head_adjoint(Tensor y, Tensor x, Tensor? weight, Tensor dot, Tensor? residual, Tensor? cotangent, "
      "str likelihood) -> Tensor",
      no_gradient());
}

}  // namespace fastvae
