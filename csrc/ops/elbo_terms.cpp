// A VAE's objective in two forward sweeps, through encoder and decoder, and its gradient in two reverse ones.
//
//   z = mu + sigma eps,  sigma = exp(logvar / 2);   log p(x | z);   kl = 1/2 sum (mu^2 + e^logvar - 1 - logvar)
//
// Back, with cotangents of all five results (c of log p, k of kl):
//
//   delta_L = c r;   gz += the decoder's reverse sweep;   gmu += sum_s gz + k mu
//   glogvar += 1/2 (sum_s gz sigma eps + k (e^logvar - 1));   the encoder's reverse sweep
//
// FLOPs: one pass over the weights forward and two back, the gradient of each weight one product over all rows.

#include "elbo_terms.h"

#include <ATen/TensorSubclassLikeUtils.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/recycling.h"
#include "../common/replay.h"
#include "../network/network.h"
#include "gaussian_kl.h"

namespace fastvae {
namespace {

// Encoder and decoder of checked inputs, dense.
struct Autoencoder {
  Autoencoder(const char* op, const at::Tensor& x_in, const at::Tensor& noise_in, at::TensorList encoder_parameters,
              at::TensorList decoder_parameters, std::string_view encoder_text, std::string_view decoder_text,
              std::string_view likelihood_text);

  at::Tensor observed() const {
    const at::Tensor rows = decoder->observed_to_rows(x);
    return draws == 1 ? rows : rows.view({samples, -1}).repeat({draws, 1}).view({-1});
  }
  int64_t encoder_numel() const { return samples * encoder_program->forward_numel(); }
  int64_t decoder_numel() const { return draws * samples * decoder_program->forward_numel(); }

  int64_t samples = 0, draws = 0, dim = 0;
  at::Tensor x, noise;
  std::shared_ptr<const Program> encoder_program, decoder_program;
  std::optional<Network> encoder, decoder;
};

Autoencoder::Autoencoder(const char* op, const at::Tensor& x_in, const at::Tensor& noise_in,
                         at::TensorList encoder_parameters, at::TensorList decoder_parameters,
                         std::string_view encoder_text, std::string_view decoder_text,
                         std::string_view likelihood_text) {
  check_floating(op, "x", x_in);
  FASTVAE_CHECK_VALUE(x_in.dim() == 2 && x_in.size(1) > 0, op, "x", "shape [B, n] with n > 0", describe(x_in));
  check_like(op, "noise", noise_in, x_in, "x");
  samples = x_in.size(0);
  FASTVAE_CHECK_VALUE(
      noise_in.dim() == 3 && noise_in.size(1) == samples && noise_in.size(0) > 0 && noise_in.size(2) > 0, op, "noise",
      c10::str("shape [S, ", samples, ", d] with S, d > 0"), describe(noise_in));
  draws = noise_in.size(0);
  dim = noise_in.size(2);
  x = x_in.contiguous();
  noise = noise_in.contiguous();
  const LikelihoodSpec likelihood = parse_likelihood(op, likelihood_text);
  encoder_program = find_encoder(op, encoder_text, encoder_parameters, x.size(1), dim, samples, Norms::kFolded);
  decoder_program = find_program(op, decoder_text, decoder_parameters, dim, likelihood, Norms::kFolded);
  check_room(op, "noise", *decoder_program, samples, draws);
  encoder.emplace(op, *encoder_program, encoder_head(), encoder_parameters, x);
  decoder.emplace(op, *decoder_program, likelihood, decoder_parameters, x);
  check_sizes(op, "x", x, {samples, observed_numel(op, *decoder_program, likelihood)});
}

at::Tensor saved(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like,
                 at::IntArrayRef sizes) {
  check_like(op, name, tensor, like, "x");
  check_sizes(op, name, tensor, sizes);
  return tensor.contiguous();
}

std::vector<at::Tensor> where_needed(std::vector<at::Tensor> found, at::TensorList parameters, at::IntArrayRef needs,
                                     const at::TensorOptions& options) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (needs[i] == 0) {
      found[i] = aten::empty({0}, options);
    } else if (!found[i].defined()) {
      found[i] = aten::zeros(parameters[i].sizes(), options);
    }
  }
  return found;
}

// Numbers that are stored of the encoder for a sample, and of the decoder for a code.
std::tuple<int64_t, int64_t> elbo_terms_stash(std::string_view encoder, std::string_view decoder,
                                              std::string_view likelihood, const TensorShapes& encoder_shapes,
                                              const TensorShapes& decoder_shapes, int64_t elements,
                                              int64_t latent_dim) {
  constexpr const char* op = "elbo_terms";
  return {Program(op, encoder, encoder_shapes, elements, encoder_head(), Norms::kFolded).forward_numel(),
          Program(op, decoder, decoder_shapes, latent_dim, parse_likelihood(op, likelihood), Norms::kFolded)
              .forward_numel()};
}

// log p(x | z) [S, B], KL(q(z | x) || N(0, I)) [B], mu and logvar [B, d], z [S, B, d]; and what the reverse sweeps take
// of encoder and decoder (empty unless `store`). x [B, n] is what the encoder reads and the likelihood observes; the
// encoder gives [B, 2 d], mean before log variance; noise [S, B, d].
std::vector<at::Tensor> terms_of(const Autoencoder& model, bool store) {
  const int64_t S = model.draws, B = model.samples, d = model.dim;
  const at::TensorOptions options = model.x.options();
  const at::Tensor encoder_stash = reused({model.encoder_numel()}, options),
                   decoder_stash = reused({model.decoder_numel()}, options);
  const at::Tensor log_px = aten::empty({S, B}, options);
  at::Tensor mu, logvar, z, kl;
  if (B == 0) {
    mu = aten::empty({B, d}, options), logvar = aten::empty({B, d}, options), z = aten::empty({S, B, d}, options);
    kl = aten::empty({B}, options);
  } else {
    const Tape encoded = model.encoder->forward_tape(encoder_stash, B);
    const at::Tensor out = model.encoder->with_bias(model.encoder->forward(model.x, encoded)).view({B, 2, d});
    mu = out.select(1, 0).contiguous();
    logvar = out.select(1, 1).contiguous();
    z = logvar.mul(0.5).exp_().mul(model.noise).add_(mu);
    kl = gaussian_kl(mu, logvar, std::nullopt, std::nullopt);
    const Tape decoded = model.decoder->forward_tape(decoder_stash, S * B);
    model.decoder->forward_residual(z.view({S * B, d}), model.observed(), decoded, log_px.view({-1}));
  }
  const auto kept = [&](const at::Tensor& of) { return store ? of : aten::empty({0}, options); };
  return {log_px, kl, mu, logvar, z, kept(encoder_stash), kept(decoder_stash)};
}

using ElboTerms = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ElboTerms elbo_terms(const at::Tensor& x, const at::Tensor& noise, at::TensorList encoder_parameters,
                     at::TensorList decoder_parameters, std::string_view encoder, std::string_view decoder,
                     std::string_view likelihood, bool store) {
  constexpr const char* op = "elbo_terms";
  constexpr size_t kOwned = 5;
  const EntryGuard guard(op, x);
  const size_t of_encoder = encoder_parameters.size(), of_both = of_encoder + decoder_parameters.size();
  const auto evaluate = [=, encoder = lasting_text(encoder, x), decoder = lasting_text(decoder, x),
                         likelihood = lasting_text(likelihood, x)](const std::vector<at::Tensor>& in) {
    const at::TensorList parameters = at::TensorList(in).slice(2);
    return terms_of(Autoencoder(op, in[0], in[1], parameters.slice(0, of_encoder), parameters.slice(of_encoder),
                                encoder, decoder, likelihood),
                    store);
  };
  const std::vector<at::Tensor> out =
      replayed({op, {encoder, decoder, likelihood}, {store ? 1 : 0, static_cast<int64_t>(of_encoder)}},
               joined({x, noise}, flattened(encoder_parameters, decoder_parameters)), {of_both, 0}, kOwned, evaluate);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

// Gradients to the parameters of encoder and decoder, empty where not needed.
// in: the five cotangents or undefined tensors; x, noise, mu, logvar, z; the parameters; the stashes.
std::vector<at::Tensor> gradients_of(const char* op, const std::vector<at::Tensor>& in, const Autoencoder& model,
                                     at::TensorList encoder_parameters, at::TensorList decoder_parameters,
                                     at::IntArrayRef needs) {
  const int64_t S = model.draws, B = model.samples, d = model.dim;
  const at::TensorOptions options = model.x.options();
  const at::IntArrayRef of_encoder = needs.slice(0, encoder_parameters.size()),
                        of_decoder = needs.slice(encoder_parameters.size());
  const at::Tensor mu = saved(op, "mu", in[7], model.x, {B, d}), logvar = saved(op, "logvar", in[8], model.x, {B, d}),
                   z = saved(op, "z", in[9], model.x, {S, B, d});
  const Tape encoded =
      model.encoder->forward_tape(saved(op, "encoder_stash", in[in.size() - 2], model.x, {model.encoder_numel()}), B);
  const Tape decoded =
      model.decoder->forward_tape(saved(op, "decoder_stash", in.back(), model.x, {model.decoder_numel()}), S * B);
  const auto cotangent = [&](const at::Tensor& grad, const char* name, at::IntArrayRef sizes) {
    return grad.defined() ? saved(op, name, grad, model.x, sizes) : at::Tensor();
  };
  const at::Tensor of_log_px = cotangent(in[0], "grad_log_px", {S, B}), of_kl = cotangent(in[1], "grad_kl", {B}),
                   of_mu = cotangent(in[2], "grad_mu", {B, d}), of_logvar = cotangent(in[3], "grad_logvar", {B, d});
  at::Tensor of_z = cotangent(in[4], "grad_z", {S, B, d});
  const auto any = [](at::IntArrayRef flags) {
    return std::any_of(flags.begin(), flags.end(), [](int64_t need) { return need != 0; });
  };
  std::vector<at::Tensor> decoder_gradients(decoder_parameters.size()), encoder_gradients(encoder_parameters.size());
  if (B > 0 && of_log_px.defined()) {
    Tape tape = model.decoder->with_reverse_room(decoded);
    const at::Tensor residual = decoded.delta.back().view({S * B, -1});
    tape.delta.back() = reused({residual.numel()}, options);
    aten::mul_out(tape.delta.back().view(residual.sizes()), residual, of_log_px.view({S * B, 1}));
    model.decoder->reverse(tape);
    if (any(of_encoder)) {
      const at::Tensor through = aten::empty({S, B, d}, options);
      const at::Tensor found = model.decoder->apply_transpose(0, tape.delta[0], through.view({-1})).view({S, B, d});
      of_z = of_z.defined() ? found.add(of_z) : found;
    }
    if (any(of_decoder)) {
      decoder_gradients = model.decoder->affine_gradients(z, tape, decoder_parameters, of_decoder);
    }
  }
  if (B > 0 && any(of_encoder)) {
    Tape tape = model.encoder->with_reverse_room(encoded);
    tape.delta.back() = aten::zeros({B * 2 * d}, options);
    const at::Tensor delta = tape.delta.back().view({B, 2, d});
    at::Tensor delta_mu = delta.select(1, 0), delta_logvar = delta.select(1, 1);
    if (of_z.defined()) {
      delta_mu.add_(S == 1 ? of_z[0] : of_z.sum(0));
      const at::Tensor along = of_z.mul(model.noise);
      delta_logvar.add_((S == 1 ? along[0] : along.sum(0)).mul_(logvar.mul(0.5).exp_()).mul_(0.5));
    }
    if (of_kl.defined()) {
      const at::Tensor k = of_kl.unsqueeze(1);
      delta_mu.addcmul_(k, mu);
      delta_logvar.addcmul_(k, logvar.expm1(), 0.5);
    }
    if (of_mu.defined()) {
      delta_mu.add_(of_mu);
    }
    if (of_logvar.defined()) {
      delta_logvar.add_(of_logvar);
    }
    model.encoder->reverse(tape);
    encoder_gradients = model.encoder->affine_gradients(model.x, tape, encoder_parameters, of_encoder);
  }
  encoder_gradients = where_needed(std::move(encoder_gradients), encoder_parameters, of_encoder, options);
  decoder_gradients = where_needed(std::move(decoder_gradients), decoder_parameters, of_decoder, options);
  return flattened(encoder_gradients, decoder_gradients);
}

using ElboGradients = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;
ElboGradients elbo_terms_backward(const OptionalTensor& grad_log_px, const OptionalTensor& grad_kl,
                                  const OptionalTensor& grad_mu, const OptionalTensor& grad_logvar,
                                  const OptionalTensor& grad_z, const at::Tensor& x, const at::Tensor& noise,
                                  const at::Tensor& mu, const at::Tensor& logvar, const at::Tensor& z,
                                  const at::Tensor& encoder_stash, const at::Tensor& decoder_stash,
                                  at::TensorList encoder_parameters, at::TensorList decoder_parameters,
                                  std::string_view encoder, std::string_view decoder, std::string_view likelihood,
                                  at::IntArrayRef needs) {
  constexpr const char* op = "elbo_terms_backward";
  constexpr size_t kStashes = 2, kBefore = 10;
  const EntryGuard guard(op, x);
  const size_t of_encoder = encoder_parameters.size(), of_both = of_encoder + decoder_parameters.size();
  FASTVAE_CHECK_VALUE(needs.size() == of_both, op, "needs", c10::str(of_both, " flags"), needs.size());
  const auto differentiate = [=, encoder = lasting_text(encoder, x), decoder = lasting_text(decoder, x),
                              likelihood = lasting_text(likelihood, x),
                              needs = needs.vec()](const std::vector<at::Tensor>& in) {
    const at::TensorList parameters = at::TensorList(in).slice(kBefore, of_both);
    const at::TensorList encodes = parameters.slice(0, of_encoder), decodes = parameters.slice(of_encoder);
    const Autoencoder model(op, in[5], in[6], encodes, decodes, encoder, decoder, likelihood);
    return gradients_of(op, in, model, encodes, decodes, needs);
  };
  const auto or_none = [](const OptionalTensor& grad) { return grad.value_or(at::Tensor()); };
  const std::vector<at::Tensor> in =
      joined({or_none(grad_log_px), or_none(grad_kl), or_none(grad_mu), or_none(grad_logvar), or_none(grad_z), x, noise,
              mu, logvar, z},
             flattened(encoder_parameters, decoder_parameters, encoder_stash, decoder_stash));
  std::vector<int64_t> numbers = needs.vec();
  numbers.push_back(static_cast<int64_t>(of_encoder));
  const std::vector<at::Tensor> out = is_under_lease(decoder_stash)
                                          ? replayed({op, {encoder, decoder, likelihood}, numbers}, in,
                                                     {of_both, kStashes}, /*owned=*/of_both, differentiate)
                                          : differentiate(in);
  const auto middle = out.begin() + static_cast<int64_t>(of_encoder);
  return {std::vector<at::Tensor>(out.begin(), middle), std::vector<at::Tensor>(middle, out.end())};
}

// --- autograd: once in closed form, again by what the caller gave for that

constexpr size_t kData = 2;   // x and noise, without a gradient
constexpr size_t kSaved = 7;  // x, noise, mu, logvar, z and the stashes

bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

struct ElboFunction : Function<ElboFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& noise,
                               at::TensorList encoder_parameters, at::TensorList decoder_parameters,
                               std::string_view encoder, std::string_view decoder, std::string_view likelihood,
                               const OptionalGradient& again) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [log_px, kl, mu, logvar, z, encoder_stash, decoder_stash] = Op<&elbo_terms>::call(
        x, noise, encoder_parameters, decoder_parameters, encoder, decoder, likelihood, /*store=*/true);
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
      auto [encoder_gradients, decoder_gradients] = Op<&elbo_terms_backward>::call(
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

ElboTerms elbo_terms_autograd(const at::Tensor& x, const at::Tensor& noise, at::TensorList encoder_parameters,
                              at::TensorList decoder_parameters, std::string_view encoder, std::string_view decoder,
                              std::string_view likelihood, bool store) {
  if (!at::GradMode::is_enabled() ||
      (!any_requires_grad(encoder_parameters) && !any_requires_grad(decoder_parameters))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return Op<&elbo_terms>::call(x, noise, encoder_parameters, decoder_parameters, encoder, decoder, likelihood, store);
  }
  const variable_list out =
      ElboFunction::apply(x, noise, encoder_parameters, decoder_parameters, encoder, decoder, likelihood, nullptr);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
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

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_operator<&elbo_terms>(
      m,
      "elbo_terms(Tensor x, Tensor noise, Tensor[] encoder_parameters, Tensor[] decoder_parameters, str encoder, "
      "str decoder, str likelihood, bool store) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      differentiated_by<&elbo_terms, &elbo_terms_autograd>());
  define_operator<&elbo_terms_backward>(
      m,
      "elbo_terms_backward(Tensor? grad_log_px, Tensor? grad_kl, Tensor? grad_mu, Tensor? grad_logvar, "
      "Tensor? grad_z, Tensor x, Tensor noise, Tensor mu, Tensor logvar, Tensor z, Tensor encoder_stash, "
      "Tensor decoder_stash, Tensor[] encoder_parameters, Tensor[] decoder_parameters, str encoder, str decoder, "
      "str likelihood, int[] needs) -> (Tensor[], Tensor[])",
      differentiated_once("elbo_terms"));
}

TORCH_LIBRARY_FRAGMENT(fastvae_internal, m) {
  define_internal<&elbo_terms_stash>(
      m,
      "elbo_terms_stash(str encoder, str decoder, str likelihood, int[][] encoder_shapes, int[][] decoder_shapes, "
      "int elements, int latent_dim) -> (int, int)");
}

}  // namespace fastvae
