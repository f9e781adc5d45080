// The sum over latents i and outputs o of |dy_o / dz_i|^p of a decoder, and its gradient in the same pass.
//
// FLOPs: with G those of one pass over the weights for all B samples, B forward, and n latents: G + n G for the value;
// with the gradient 2 n G more (adjoint and weight gradients), and 2 G where an activation is curved. The Jacobian is
// never stored: tiles of (sample, latent) and, of a last Linear layer, blocks of columns.

#include <algorithm>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/recycling.h"
#include "../network/jacobian.h"
#include "ops.h"

namespace fastvae {
namespace {

// Bytes of workspace for a tile, which decide how many samples and latents it holds.
constexpr int64_t kTileBytesOnCpu = int64_t{32} << 20;
constexpr int64_t kTileBytesOnCuda = int64_t{512} << 20;

enum class Reduction { kNone, kMean, kSum };

Reduction parse_reduction(const char* op, std::string_view text) {
  if (text == "none") {
    return Reduction::kNone;
  }
  FASTVAE_CHECK_VALUE(text == "mean" || text == "sum", op, "reduction", "'mean', 'sum' or 'none'",
                      "'" + std::string(text) + "'");
  return text == "mean" ? Reduction::kMean : Reduction::kSum;
}

at::Tensor reduce(const at::Tensor& terms, Reduction reduction) {
  switch (reduction) {
    case Reduction::kMean:
      return terms.mean();
    case Reduction::kSum:
      return terms.sum();
    default:
      return terms;
  }
}

// The checked inputs, and the network bound to its tensors.
struct Jacobian {
  Jacobian(const char* op, const at::Tensor& z_in, at::TensorList parameters, std::string_view network_text,
           at::IntArrayRef latents_in, int64_t p, std::string_view reduction_text)
      : reduction(parse_reduction(op, reduction_text)),
        program(op, network_text, shapes_of(parameters), checked_dim(op, z_in), LikelihoodSpec{}),
        network(op, program, LikelihoodSpec{}, parameters, z_in),
        latents(latents_in),
        squared(p == 2) {
    FASTVAE_CHECK_VALUE(p == 1 || p == 2, op, "p", "1 or 2", p);
    for (const int64_t latent : latents) {
      FASTVAE_CHECK_VALUE(latent >= 0 && latent < z_in.size(1), op, "latents",
                          c10::str("indices in [0, ", z_in.size(1), ")"), latents);
    }
    z = z_in.contiguous();
  }

  // terms [B], zero on entry; the others as JacobianSweep takes them.
  void run(const at::Tensor& weight, const at::Tensor& terms, const at::Tensor& grad_z,
           std::vector<at::Tensor>& gradients) const {
    const int64_t samples = z.size(0), count = static_cast<int64_t>(latents.size());
    if (samples == 0 || count == 0) {
      return;
    }
    const int64_t budget = (z.is_cpu() ? kTileBytesOnCpu : kTileBytesOnCuda) / z.element_size();
    const int64_t for_latents = budget - JacobianSweep::numel_per_sample(program);
    // A decoder of one Linear layer keeps nothing for a latent.
    const int64_t of_latent = std::max<int64_t>(1, JacobianSweep::numel_per_latent(program));
    const int64_t group = std::clamp<int64_t>(for_latents / of_latent, 1, count);
    const int64_t of_sample = group * of_latent + JacobianSweep::numel_per_sample(program);
    const int64_t tile = std::clamp<int64_t>(budget / of_sample, 1, samples);
    for (int64_t first = 0; first < count; first += group) {
      JacobianSweep sweep(network, latents.slice(first, std::min(group, count - first)), squared, tile, gradients,
                          grad_z.defined());
      for (int64_t sample = 0; sample < samples; sample += tile) {
        const auto part = [&](const at::Tensor& whole) {
          return whole.defined() ? whole.narrow(0, sample, std::min(tile, samples - sample)) : whole;
        };
        sweep.run(part(z), part(weight), part(terms), part(grad_z));
      }
      sweep.finish();
    }
  }

  // A sample whose code is not finite is NaN, though the slopes of a ReLU would not show it.
  void mark(const at::Tensor& terms) const { terms.add_(z.sub(z).sum(1)); }

  Reduction reduction;
  Program program;
  Network network;
  at::IntArrayRef latents;
  bool squared;
  at::Tensor z;
};

}  // namespace

at::Tensor jacobian_l1(const at::Tensor& z, at::TensorList parameters, std::string_view network,
                       at::IntArrayRef latents, int64_t p, std::string_view reduction) {
  constexpr const char* op = "jacobian_l1";
  const EntryGuard guard(op, {z});
  const Jacobian jacobian(op, z, parameters, network, latents, p, reduction);
  const at::Tensor terms = aten::zeros({z.size(0)}, z.options());
  std::vector<at::Tensor> none(parameters.size());
  jacobian.run({}, terms, {}, none);
  jacobian.mark(terms);
  return reduce(terms, jacobian.reduction);
}

JacobianGradients jacobian_l1_with_gradient(const OptionalTensor& cotangent_in, const at::Tensor& z,
                                            at::TensorList parameters, std::string_view network,
                                            at::IntArrayRef latents, int64_t p, std::string_view reduction,
                                            at::IntArrayRef needs) {
  constexpr const char* op = "jacobian_l1_with_gradient";
  const EntryGuard guard(op, {z});
  const Jacobian jacobian(op, z, parameters, network, latents, p, reduction);
  const int64_t B = z.size(0);
  const at::TensorOptions options = z.options();
  FASTVAE_CHECK_VALUE(needs.size() == 1 + parameters.size(), op, "needs", c10::str(1 + parameters.size(), " flags"),
                      needs.size());
  FASTVAE_CHECK_VALUE(cotangent_in.has_value() == (jacobian.reduction == Reduction::kNone), op, "cotangent",
                      "a tensor with reduction 'none', and with no other", cotangent_in.has_value());
  at::Tensor weight;
  if (cotangent_in.has_value()) {
    refuse_forward_mode(op, *cotangent_in);
    check_like(op, "cotangent", *cotangent_in, z, "z");
    check_sizes(op, "cotangent", *cotangent_in, {B});
    weight = cotangent_in->contiguous();
  } else if (jacobian.reduction == Reduction::kMean) {
    weight = z.new_full({B}, 1.0 / static_cast<double>(std::max<int64_t>(1, B)), options);
  }
  std::vector<at::Tensor> gradients(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (needs[1 + i]) {
      gradients[i] = reused(parameters[i].sizes(), options).zero_();
    }
  }
  const at::Tensor grad_z = needs[0] ? aten::zeros(z.sizes(), options) : at::Tensor();
  const at::Tensor terms = aten::zeros({B}, options);
  jacobian.run(weight, terms, grad_z, gradients);
  jacobian.mark(terms);
  for (at::Tensor& gradient : gradients) {
    gradient = gradient.defined() ? gradient : aten::empty({0}, options);
  }
  return {reduce(terms, jacobian.reduction), needs[0] ? grad_z : aten::empty({0}, options), gradients};
}

}  // namespace fastvae
