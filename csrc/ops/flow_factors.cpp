// What TracIn asks of a model: the factors of per-sample gradients to its parameters, from one sweep of a decoder with
// its likelihood, from one of a whole VAE, or from a Hamiltonian flow.

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/operator.h"
#include "../common/recycling.h"
#include "flow.h"

namespace fastvae {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// StageFactors as Python takes them: weight, bias, h, delta, hdot, delta_dot, the last two None without tangents.
using Stage = std::tuple<int64_t, int64_t, at::Tensor, at::Tensor, OptionalTensor, OptionalTensor>;
#define FASTVAE_STAGES "(int, int, Tensor, Tensor, Tensor?, Tensor?)[]"

std::vector<Stage> as_tuples(const std::vector<StageFactors>& stages) {
  const auto or_none = [](const at::Tensor& tensor) {
    return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
  };
  std::vector<Stage> found;
  for (const StageFactors& stage : stages) {
    found.emplace_back(stage.weight, stage.bias, stage.h, stage.delta, or_none(stage.hdot), or_none(stage.delta_dot));
  }
  return found;
}

// Gradients to z and rho, step_terms, alpha_terms and stages: FlowFactors.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<Stage>> hamiltonian_flow_factors(
    const OptionalTensor& grad_z, const OptionalTensor& grad_rho, const OptionalTensor& grad_log_px,
    const at::Tensor& z, const at::Tensor& rho, const at::Tensor& x, const at::Tensor& step_size,
    const at::Tensor& alpha, at::TensorList parameters, const at::Tensor& z_steps, const at::Tensor& rho_steps,
    std::string_view network, std::string_view likelihood) {
  constexpr const char* op = "hamiltonian_flow_factors";
  const EntryGuard guard(op, z);
  const Flow flow(op, z, rho, x, step_size, alpha, parameters, network, likelihood, Norms::kApart);
  const int64_t K = flow.steps, B = flow.samples, d = flow.dim;
  FASTVAE_CHECK_VALUE(B > 0, op, "z", "at least one sample", describe(z));
  const FlowCotangents cotangents = flow.cotangents(grad_z, grad_rho, grad_log_px);
  const auto room = [&](at::IntArrayRef sizes) { return aten::empty(sizes, z.options()); };
  // Without the stash: the factors of all steps are wanted in any case.
  const FlowPath path = flow.path(z_steps, rho_steps, room({0}), /*store=*/false);
  FlowFactors factors;
  FlowResult out{room({B, d}), room({B, d}), false, {}, room({K, d}), room({K}), {}};
  out.parameters.resize(parameters.size());
  out.factors = &factors;
  sweep_flow_backward(flow, path, cotangents, out);
  return {out.z, out.rho, factors.step_terms, factors.alpha_terms, as_tuples(factors.stages)};
}

Tape one_point(const Network& network, int64_t samples) {
  const at::Tensor storage = recycled({samples * network.program().tape_numel()}, network.options());
  return network.tape(storage, 1, samples, 0, 1);
}

// A decoder with its likelihood, swept forward and back: the first point of a flow; no step is taken.
class DecoderSweep {
 public:
  DecoderSweep(const char* op, const at::Tensor& z, const at::Tensor& x, at::TensorList parameters,
               std::string_view network_text, std::string_view likelihood)
      : no_step_(aten::zeros({1}, z.options())),
        flow_(op, z, z, x, no_step_, no_step_, parameters, network_text, likelihood, Norms::kApart),
        network_(op, *flow_.program, flow_.likelihood, flow_.parameters, flow_.z),
        tape_(one_point(network_, flow_.samples)) {}

  // Writes log p(x | z) [B] where defined; gives the gradient [B, d] of scale times it, as factors() are of it.
  at::Tensor run(const at::Tensor& log_px, double scale = 1) const {
    return network_.forward_reverse(flow_.z, network_.observed_to_rows(flow_.x), tape_, log_px, scale);
  }

  std::vector<StageFactors> factors() const { return network_.factors(flow_.z, {}, tape_, {}, 0); }

 private:
  at::Tensor no_step_;
  Flow flow_;
  Network network_;
  Tape tape_;
};

// log p(x | z) [B], its gradient to z [B, d], and its factors.
std::tuple<at::Tensor, at::Tensor, std::vector<Stage>> decoder_factors(const at::Tensor& z, const at::Tensor& x,
                                                                       at::TensorList parameters,
                                                                       std::string_view network,
                                                                       std::string_view likelihood) {
  constexpr const char* op = "decoder_factors";
  const EntryGuard guard(op, z);
  const DecoderSweep sweep(op, z, x, parameters, network, likelihood);
  const at::Tensor log_px = aten::empty({z.size(0)}, z.options());
  at::Tensor grad_z = sweep.run(log_px);
  return {log_px, std::move(grad_z), as_tuples(sweep.factors())};
}

// The first two alone.
std::tuple<at::Tensor, at::Tensor> decoder_gradient(const at::Tensor& z, const at::Tensor& x, at::TensorList parameters,
                                                    std::string_view network, std::string_view likelihood) {
  constexpr const char* op = "decoder_gradient";
  const EntryGuard guard(op, z);
  const DecoderSweep sweep(op, z, x, parameters, network, likelihood);
  const at::Tensor log_px = aten::empty({z.size(0)}, z.options());
  return {log_px, sweep.run(log_px)};
}

// The factors of the encoder's and the decoder's gradients, of the loss beta KL - log p(x | z) of each of x [B, n],
// averaged over the draws noise [B S, d] of z = mu + exp(logvar / 2) noise. The encoder reads x and gives [B, 2 d].
std::tuple<std::vector<Stage>, std::vector<Stage>> vae_factors(const at::Tensor& x, const at::Tensor& noise,
                                                               double beta, at::TensorList encoder_parameters,
                                                               std::string_view encoder_text,
                                                               at::TensorList decoder_parameters,
                                                               std::string_view decoder_text,
                                                               std::string_view likelihood) {
  constexpr const char* op = "vae_factors";
  const EntryGuard guard(op, x);
  check_floating(op, "x", x);
  check_like(op, "noise", noise, x, "x");
  FASTVAE_CHECK_VALUE(x.dim() == 2 && x.size(0) > 0, op, "x", "shape [B, n], B > 0", describe(x));
  FASTVAE_CHECK_VALUE(noise.dim() == 2 && noise.size(0) > 0 && noise.size(0) % x.size(0) == 0, op, "noise",
                      c10::str("shape [B S, d], B = ", x.size(0)), describe(noise));
  const int64_t samples = x.size(0), d = noise.size(1), draws = noise.size(0) / samples;
  const at::Tensor images = x.contiguous();
  const std::shared_ptr<const Program> program =
      find_encoder(op, encoder_text, encoder_parameters, x.size(1), d, samples, Norms::kApart);
  const Network encoder(op, *program, encoder_head(), encoder_parameters, images);
  const Tape encoded = one_point(encoder, samples);
  const at::Tensor out = encoder.with_bias(encoder.forward(images, encoded)).view({samples, 2, d});
  const at::Tensor mu = out.select(1, 0), logvar = out.select(1, 1);
  const at::Tensor eps = noise.contiguous().view({samples, draws, d});
  const at::Tensor spread = logvar.mul(0.5).exp().unsqueeze(1).mul(eps);  // sigma eps
  const at::Tensor z = spread.add(mu.unsqueeze(1)).view({samples * draws, d});

  const at::Tensor rows = draws == 1 ? images : images.repeat_interleave(draws, 0);
  const DecoderSweep decoder(op, z, rows, decoder_parameters, decoder_text, likelihood);
  // The loss is beta KL - log p, averaged over the draws.
  const at::Tensor of_z = decoder.run({}, -1.0 / static_cast<double>(draws));
  const at::Tensor of_draws = of_z.view({samples, draws, d});
  at::Tensor delta = encoded.delta.back().view({samples, 2, d});
  delta.select(1, 0).copy_(of_draws.sum(1).add_(mu, beta));
  delta.select(1, 1).copy_(of_draws.mul(spread).sum(1).add_(logvar.exp().sub_(1), beta).mul_(0.5));
  encoder.reverse(encoded);
  return {as_tuples(encoder.factors(images, {}, encoded, {}, 0)), as_tuples(decoder.factors())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae_internal, m) {
  define_internal<&hamiltonian_flow_factors>(
      m,
      "hamiltonian_flow_factors(Tensor? grad_z, Tensor? grad_rho, Tensor? grad_log_px, Tensor z, Tensor rho, Tensor x, "
      "Tensor step_size, Tensor alpha, Tensor[] parameters, Tensor z_steps, Tensor rho_steps, str network, "
      "str likelihood) -> (Tensor, Tensor, Tensor, Tensor, " FASTVAE_STAGES ")");
  define_internal<&decoder_factors>(
      m,
      "decoder_factors(Tensor z, Tensor x, Tensor[] parameters, str network, str likelihood) "
      "-> (Tensor, Tensor, " FASTVAE_STAGES ")");
  define_internal<&decoder_gradient>(
      m, "decoder_gradient(Tensor z, Tensor x, Tensor[] parameters, str network, str likelihood) -> (Tensor, Tensor)");
  define_internal<&vae_factors>(
      m,
      "vae_factors(Tensor x, Tensor noise, float beta, Tensor[] encoder_parameters, str encoder, "
      "Tensor[] decoder_parameters, str decoder, str likelihood) -> (" FASTVAE_STAGES ", " FASTVAE_STAGES ")");
}

}  // namespace fastvae
