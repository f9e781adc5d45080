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

#include <algorithm>
#include <memory>
#include <optional>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/recycling.h"
#include "ops.h"

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
  encoder_program = find_encoder(op, encoder_text, encoder_parameters, x.size(1), dim, samples);
  decoder_program = find_program(op, decoder_text, decoder_parameters, dim, likelihood);
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

}  // namespace

std::tuple<int64_t, int64_t> elbo_terms_stash(std::string_view encoder, std::string_view decoder,
                                              std::string_view likelihood, const TensorShapes& encoder_shapes,
                                              const TensorShapes& decoder_shapes, int64_t elements,
                                              int64_t latent_dim) {
  constexpr const char* op = "elbo_terms";
  return {Program(op, encoder, encoder_shapes, elements, encoder_head()).forward_numel(),
          Program(op, decoder, decoder_shapes, latent_dim, parse_likelihood(op, likelihood)).forward_numel()};
}

ElboTerms elbo_terms(const at::Tensor& x, const at::Tensor& noise, at::TensorList encoder_parameters,
                     at::TensorList decoder_parameters, std::string_view encoder, std::string_view decoder,
                     std::string_view likelihood, bool store) {
  constexpr const char* op = "elbo_terms";
  const EntryGuard guard(op, {x, noise});
  const Autoencoder model(op, x, noise, encoder_parameters, decoder_parameters, encoder, decoder, likelihood);
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

ElboGradients elbo_terms_backward(const OptionalTensor& grad_log_px, const OptionalTensor& grad_kl,
                                  const OptionalTensor& grad_mu, const OptionalTensor& grad_logvar,
                                  const OptionalTensor& grad_z, const at::Tensor& x, const at::Tensor& noise,
                                  const at::Tensor& mu_in, const at::Tensor& logvar_in, const at::Tensor& z_in,
                                  const at::Tensor& encoder_stash, const at::Tensor& decoder_stash,
                                  at::TensorList encoder_parameters, at::TensorList decoder_parameters,
                                  std::string_view encoder, std::string_view decoder, std::string_view likelihood,
                                  at::IntArrayRef needs) {
  constexpr const char* op = "elbo_terms_backward";
  const EntryGuard guard(op, {x, noise, mu_in, logvar_in, z_in, encoder_stash, decoder_stash});
  const Autoencoder model(op, x, noise, encoder_parameters, decoder_parameters, encoder, decoder, likelihood);
  const int64_t S = model.draws, B = model.samples, d = model.dim;
  const at::TensorOptions options = model.x.options();
  FASTVAE_CHECK_VALUE(needs.size() == encoder_parameters.size() + decoder_parameters.size(), op, "needs",
                      c10::str(encoder_parameters.size() + decoder_parameters.size(), " flags"), needs.size());
  const at::IntArrayRef of_encoder = needs.slice(0, encoder_parameters.size()),
                        of_decoder = needs.slice(encoder_parameters.size());
  const at::Tensor mu = saved(op, "mu", mu_in, model.x, {B, d}),
                   logvar = saved(op, "logvar", logvar_in, model.x, {B, d}),
                   z = saved(op, "z", z_in, model.x, {S, B, d});
  const Tape encoded =
      model.encoder->forward_tape(saved(op, "encoder_stash", encoder_stash, model.x, {model.encoder_numel()}), B);
  const Tape decoded =
      model.decoder->forward_tape(saved(op, "decoder_stash", decoder_stash, model.x, {model.decoder_numel()}), S * B);
  const auto cotangent = [&](const OptionalTensor& grad, const char* name, at::IntArrayRef sizes) {
    return grad.has_value() && grad->defined() ? saved(op, name, *grad, model.x, sizes) : at::Tensor();
  };
  const at::Tensor of_log_px = cotangent(grad_log_px, "grad_log_px", {S, B}),
                   of_kl = cotangent(grad_kl, "grad_kl", {B}), of_mu = cotangent(grad_mu, "grad_mu", {B, d}),
                   of_logvar = cotangent(grad_logvar, "grad_logvar", {B, d});
  at::Tensor of_z = cotangent(grad_z, "grad_z", {S, B, d});
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
  return {where_needed(std::move(encoder_gradients), encoder_parameters, of_encoder, options),
          where_needed(std::move(decoder_gradients), decoder_parameters, of_decoder, options)};
}

}  // namespace fastvae
