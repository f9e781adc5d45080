// The sum over latents i and outputs o of |dy_o / dz_i|^p of a decoder, and its gradient in the same pass.
//
// FLOPs: with G those of one pass over the weights for all B samples, B forward, and n latents: G + n G for the value;
// with the gradient 2 n G more (adjoint and weight gradients), and 2 G where an activation is curved. The Jacobian is
// never stored: tiles of (sample, latent) and, of a last Linear layer, blocks of columns.

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/operator.h"
#include "../common/recycling.h"
#include "../common/replay.h"
#include "../network/jacobian.h"

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
        program(op, network_text, shapes_of(parameters), checked_dim(op, z_in), LikelihoodSpec{}, Norms::kFolded),
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
    const int64_t budget = (runs_cuda(z) ? kTileBytesOnCuda : kTileBytesOnCpu) / z.element_size();
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

// [] or [B].
at::Tensor jacobian_l1(const at::Tensor& z, at::TensorList parameters, std::string_view network,
                       at::IntArrayRef latents, int64_t p, std::string_view reduction) {
  constexpr const char* op = "jacobian_l1";
  const EntryGuard guard(op, z);
  std::vector<int64_t> numbers = latents.vec();
  numbers.push_back(p);
  const auto norm = [=, network = lasting_text(network, z), reduction = lasting_text(reduction, z),
                     latents = latents.vec()](const std::vector<at::Tensor>& in) -> std::vector<at::Tensor> {
    const at::TensorList of_network = at::TensorList(in).slice(1);
    const Jacobian jacobian(op, in[0], of_network, network, latents, p, reduction);
    const at::Tensor terms = aten::zeros({in[0].size(0)}, in[0].options());
    std::vector<at::Tensor> none(of_network.size());
    jacobian.run({}, terms, {}, none);
    jacobian.mark(terms);
    return {reduce(terms, jacobian.reduction)};
  };
  return replayed({op, {network, reduction}, numbers}, joined({z}, parameters), {parameters.size(), 0},
                  /*owned=*/1, norm)[0];
}

// The same, and the gradient to z and the parameters (empty where not needed): of the reduced value or, with reduction
// "none", of cotangent . value. Inputs: the cotangent or an undefined tensor, z, the parameters.
std::vector<at::Tensor> norm_and_gradient(const char* op, const std::vector<at::Tensor>& in, const Jacobian& jacobian,
                                          at::IntArrayRef needs) {
  const at::Tensor &cotangent = in[0], &z = in[1];
  const at::TensorList parameters = at::TensorList(in).slice(2);
  const int64_t B = z.size(0);
  const at::TensorOptions options = z.options();
  FASTVAE_CHECK_VALUE(needs.size() == 1 + parameters.size(), op, "needs", c10::str(1 + parameters.size(), " flags"),
                      needs.size());
  FASTVAE_CHECK_VALUE(cotangent.defined() == (jacobian.reduction == Reduction::kNone), op, "cotangent",
                      "a tensor with reduction 'none', and with no other", cotangent.defined());
  at::Tensor weight;
  if (cotangent.defined()) {
    check_like(op, "cotangent", cotangent, z, "z");
    check_sizes(op, "cotangent", cotangent, {B});
    weight = cotangent.contiguous();
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
  std::vector<at::Tensor> found{reduce(terms, jacobian.reduction), needs[0] ? grad_z : aten::empty({0}, options)};
  for (const at::Tensor& gradient : gradients) {
    found.push_back(gradient.defined() ? gradient : aten::empty({0}, options));
  }
  return found;
}

using JacobianGradients = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;
JacobianGradients jacobian_l1_with_gradient(const OptionalTensor& cotangent, const at::Tensor& z,
                                            at::TensorList parameters, std::string_view network,
                                            at::IntArrayRef latents, int64_t p, std::string_view reduction,
                                            at::IntArrayRef needs) {
  constexpr const char* op = "jacobian_l1_with_gradient";
  const EntryGuard guard(op, z);
  std::vector<int64_t> numbers = needs.vec();
  numbers.push_back(p);
  numbers.insert(numbers.end(), latents.begin(), latents.end());
  const auto norm = [=, network = lasting_text(network, z), reduction = lasting_text(reduction, z),
                     latents = latents.vec(), needs = needs.vec()](const std::vector<at::Tensor>& in) {
    const Jacobian jacobian(op, in[1], at::TensorList(in).slice(2), network, latents, p, reduction);
    return norm_and_gradient(op, in, jacobian, needs);
  };
  const std::vector<at::Tensor> out =
      replayed({op, {network, reduction}, numbers}, joined({cotangent.value_or(at::Tensor()), z}, parameters),
               {parameters.size(), 0}, 2 + parameters.size(), norm);
  return {out[0], out[1], std::vector<at::Tensor>(out.begin() + 2, out.end())};
}

// Inputs: z and the parameters. A scalar's gradient is computed with its value and kept; that of "none" waits for the
// cotangents of the samples.
struct JacobianFunction : Function<JacobianFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& z, at::TensorList parameters,
                            std::string_view network, at::IntArrayRef latents, int64_t p, std::string_view reduction,
                            const std::vector<int64_t>& needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved{z};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    at::Tensor value;
    if (reduction == "none") {
      value = Op<&jacobian_l1>::call(z, parameters, network, latents, p, reduction);
    } else {
      auto [reduced, grad_z, grad_parameters] =
          Op<&jacobian_l1_with_gradient>::call(std::nullopt, z, parameters, network, latents, p, reduction, needs);
      value = reduced;
      variable_list gradients{grad_z};
      gradients.insert(gradients.end(), grad_parameters.begin(), grad_parameters.end());
      ctx->saved_data["gradients"] = gradients;
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["needs"] = needs;
    ctx->saved_data["network"] = std::string(network);
    ctx->saved_data["latents"] = latents.vec();
    ctx->saved_data["p"] = p;
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> needs = ctx->saved_data["needs"].toIntVector();
    const size_t inputs = needs.size();
    variable_list found;
    if (const auto kept = ctx->saved_data.find("gradients"); kept != ctx->saved_data.end()) {
      variable_list gradients = kept->second.toTensorVector();
      // Without retain_graph nobody asks again: the gradients become the result, instead of a copy of all parameters.
      if (!torch::autograd::get_current_graph_task_keep_graph() && !at::GradMode::is_enabled() &&
          !at::isTensorSubclassLike(grads[0]) && !at::areAnyTensorSubclassLike(gradients)) {
        ctx->saved_data.erase(kept);
        for (const at::Tensor& gradient : gradients) {
          found.push_back(gradient.mul_(grads[0]));
        }
      } else {
        // It takes what they were computed from, to refuse to go through them.
        found = differentiated_once("jacobian_l1", flattened(grads[0], gradients, saved), [&] {
          variable_list scaled;
          for (const at::Tensor& gradient : gradients) {
            scaled.push_back(gradient.mul(grads[0]));
          }
          return scaled;
        });
      }
    } else {
      const std::vector<int64_t> latents = ctx->saved_data["latents"].toIntVector();
      auto [value, grad_z, grad_parameters] = Op<&jacobian_l1_with_gradient>::call(
          grads[0], saved[0], at::TensorList(saved).slice(1), ctx->saved_data["network"].toStringRef(), latents,
          ctx->saved_data["p"].toInt(), "none", needs);
      found.push_back(grad_z);
      found.insert(found.end(), grad_parameters.begin(), grad_parameters.end());
    }
    drop_unneeded(found, needs);
    found.resize(inputs + 5);  // network, latents, p, reduction, needs
    return found;
  }
};

at::Tensor jacobian_l1_autograd(const at::Tensor& z, at::TensorList parameters, std::string_view network,
                                at::IntArrayRef latents, int64_t p, std::string_view reduction) {
  std::vector<int64_t> needs{z.requires_grad()};
  for (const at::Tensor& parameter : parameters) {
    needs.push_back(parameter.requires_grad());
  }
  if (!at::GradMode::is_enabled() || std::none_of(needs.begin(), needs.end(), [](int64_t need) { return need != 0; })) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return Op<&jacobian_l1>::call(z, parameters, network, latents, p, reduction);
  }
  return JacobianFunction::apply(z, parameters, network, latents, p, reduction, needs);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_operator<&jacobian_l1>(
      m, "jacobian_l1(Tensor z, Tensor[] parameters, str network, int[] latents, int p, str reduction) -> Tensor",
      differentiated_by<&jacobian_l1, &jacobian_l1_autograd>());
  define_operator<&jacobian_l1_with_gradient>(
      m,
      "jacobian_l1_with_gradient(Tensor? cotangent, Tensor z, Tensor[] parameters, str network, int[] latents, int p, "
      "str reduction, int[] needs) -> (Tensor, Tensor, Tensor[])",
      differentiated_once("jacobian_l1"));
}

}  // namespace fastvae
