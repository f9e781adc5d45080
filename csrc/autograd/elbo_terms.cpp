// Autograd of elbo_terms: once in closed form, again by what the caller gave for that.
#include <ATen/TensorSubclassLikeUtils.h>

#include <algorithm>

#include "autograd.h"

namespace fastvae {
namespace {

constexpr size_t kData = 2;   // x and noise, without a gradient
constexpr size_t kSaved = 7;  // x, noise, mu, logvar, z and the stashes

const Op<decltype(elbo_terms)>& terms_op() {
  static const Op<decltype(elbo_terms)> op("fastvae::elbo_terms");
  return op;
}
const Op<decltype(elbo_terms_backward)>& terms_backward_op() {
  static const Op<decltype(elbo_terms_backward)> op("fastvae::elbo_terms_backward");
  return op;
}

bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

struct ElboFunction : Function<ElboFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& noise,
                               at::TensorList encoder_parameters, at::TensorList decoder_parameters,
                               std::string_view encoder, std::string_view decoder, std::string_view likelihood,
                               const OptionalGradient& again) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [log_px, kl, mu, logvar, z, encoder_stash, decoder_stash] =
        terms_op()(x, noise, encoder_parameters, decoder_parameters, encoder, decoder, likelihood, /*store=*/true);
    variable_list saved{x, noise, mu, logvar, z, encoder_stash, decoder_stash};
    saved.insert(saved.end(), encoder_parameters.begin(), encoder_parameters.end());
    saved.insert(saved.end(), decoder_parameters.begin(), decoder_parameters.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["encoder_size"] = static_cast<int64_t>(encoder_parameters.size());
    ctx->saved_data["encoder"] = std::string(encoder);
    ctx->saved_data["decoder"] = std::string(decoder);
    ctx->saved_data["likelihood"] = std::string(likelihood);
    if (again) {
      ctx->saved_data["again"] = c10::IValue::make_capsule(again);
    }
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({encoder_stash, decoder_stash});
    return {log_px, kl, mu, logvar, z, encoder_stash, decoder_stash};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t parameters = saved.size() - kSaved;
    variable_list found(kData);
    const auto again = ctx->saved_data.find("again");
    // Also where grads are many at once, under a transform.
    const bool plain = !at::GradMode::is_enabled() && !at::areAnyTensorSubclassLike(grads);
    if (!plain && again != ctx->saved_data.end()) {
      const auto& gradient = static_cast<const DifferentiableGradient&>(*again->second.toCapsule());
      const variable_list all = gradient(variable_list(grads.begin(), grads.begin() + 5), saved[0], saved[1]);
      found.insert(found.end(), all.begin(), all.end());
    } else {
      const auto of_encoder = static_cast<size_t>(ctx->saved_data["encoder_size"].toInt());
      std::vector<int64_t> needs(parameters);
      for (size_t i = 0; i < parameters; ++i) {
        needs[i] = ctx->needs_input_grad(kData + i) ? 1 : 0;
      }
      std::optional<at::AutoDispatchBelowADInplaceOrView> below;
      if (!at::GradMode::is_enabled()) {
        below.emplace();
      }
      const at::TensorList tensors = at::TensorList(saved).slice(kSaved);
      auto [encoder_gradients, decoder_gradients] = terms_backward_op()(
          optional_of(grads[0]), optional_of(grads[1]), optional_of(grads[2]), optional_of(grads[3]),
          optional_of(grads[4]), saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
          tensors.slice(0, of_encoder), tensors.slice(of_encoder), ctx->saved_data["encoder"].toStringRef(),
          ctx->saved_data["decoder"].toStringRef(), ctx->saved_data["likelihood"].toStringRef(), needs);
      variable_list gradients = std::move(encoder_gradients);
      gradients.insert(gradients.end(), decoder_gradients.begin(), decoder_gradients.end());
      drop_unneeded(gradients, needs);
      found.insert(found.end(), gradients.begin(), gradients.end());
    }
    found.resize(kData + parameters + 4);  // encoder, decoder, likelihood, again
    return found;
  }
};

struct ElboBackwardFunction : Function<ElboBackwardFunction> {
  static variable_list forward(AutogradContext*, const OptionalTensor& grad_log_px, const OptionalTensor& grad_kl,
                               const OptionalTensor& grad_mu, const OptionalTensor& grad_logvar,
                               const OptionalTensor& grad_z, const at::Tensor& x, const at::Tensor& noise,
                               const at::Tensor& mu, const at::Tensor& logvar, const at::Tensor& z,
                               const at::Tensor& encoder_stash, const at::Tensor& decoder_stash,
                               at::TensorList encoder_parameters, at::TensorList decoder_parameters,
                               std::string_view encoder, std::string_view decoder, std::string_view likelihood,
                               at::IntArrayRef needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [of_encoder, of_decoder] =
        terms_backward_op()(grad_log_px, grad_kl, grad_mu, grad_logvar, grad_z, x, noise, mu, logvar, z, encoder_stash,
                            decoder_stash, encoder_parameters, decoder_parameters, encoder, decoder, likelihood, needs);
    variable_list out = std::move(of_encoder);
    out.insert(out.end(), of_decoder.begin(), of_decoder.end());
    return out;
  }
  static variable_list backward(AutogradContext*, const variable_list&) { refuse_second_derivative("elbo_terms"); }
};

ElboTerms terms(const at::Tensor& x, const at::Tensor& noise, at::TensorList encoder_parameters,
                at::TensorList decoder_parameters, std::string_view encoder, std::string_view decoder,
                std::string_view likelihood, bool store) {
  if (!at::GradMode::is_enabled() ||
      (!any_requires_grad(encoder_parameters) && !any_requires_grad(decoder_parameters))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return terms_op()(x, noise, encoder_parameters, decoder_parameters, encoder, decoder, likelihood, store);
  }
  const variable_list out =
      ElboFunction::apply(x, noise, encoder_parameters, decoder_parameters, encoder, decoder, likelihood, nullptr);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

ElboGradients terms_backward(const OptionalTensor& grad_log_px, const OptionalTensor& grad_kl,
                             const OptionalTensor& grad_mu, const OptionalTensor& grad_logvar,
                             const OptionalTensor& grad_z, const at::Tensor& x, const at::Tensor& noise,
                             const at::Tensor& mu, const at::Tensor& logvar, const at::Tensor& z,
                             const at::Tensor& encoder_stash, const at::Tensor& decoder_stash,
                             at::TensorList encoder_parameters, at::TensorList decoder_parameters,
                             std::string_view encoder, std::string_view decoder, std::string_view likelihood,
                             at::IntArrayRef needs) {
  const variable_list out = ElboBackwardFunction::apply(grad_log_px, grad_kl, grad_mu, grad_logvar, grad_z, x, noise,
                                                        mu, logvar, z, encoder_stash, decoder_stash, encoder_parameters,
                                                        decoder_parameters, encoder, decoder, likelihood, needs);
  const auto middle = out.begin() + static_cast<int64_t>(encoder_parameters.size());
  return {std::vector<at::Tensor>(out.begin(), middle), std::vector<at::Tensor>(middle, out.end())};
}

}  // namespace

variable_list differentiable_elbo_terms(const at::Tensor& x, const at::Tensor& noise, at::TensorList encoder_parameters,
                                        at::TensorList decoder_parameters, std::string_view encoder,
                                        std::string_view decoder, std::string_view likelihood,
                                        const OptionalGradient& again) {
  variable_list out =
      ElboFunction::apply(x, noise, encoder_parameters, decoder_parameters, encoder, decoder, likelihood, again);
  out.resize(5);
  return out;
}

}  // namespace fastvae

TORCH_LIBRARY_IMPL(fastvae, Autograd, m) {
  m.impl("elbo_terms", &fastvae::terms);
  m.impl("elbo_terms_backward", &fastvae::terms_backward);
}
