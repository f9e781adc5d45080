// The gradient of a weighted sum of log p(x | z): a forward sweep, whose activations live no longer than this call, and
// a reverse one. FLOPs: three passes over the weights for each code.

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/operator.h"
#include "../common/recycling.h"
#include "../network/network.h"

namespace fastvae {
namespace {

// The gradients of  cotangent . log p(x | z)  to z [N, d] and to the parameters (empty where not needed), for cotangent
// [N] and x [N, n].
std::tuple<at::Tensor, std::vector<at::Tensor>> log_px_pullback(const at::Tensor& z_in, const at::Tensor& x_in,
                                                                const at::Tensor& cotangent, at::TensorList parameters,
                                                                std::string_view network_text,
                                                                std::string_view likelihood_text,
                                                                at::IntArrayRef needs) {
  constexpr const char* op = "log_px_pullback";
  const EntryGuard guard(op, z_in);
  const int64_t dim = checked_dim(op, z_in), codes = z_in.size(0);
  const LikelihoodSpec likelihood = parse_likelihood(op, likelihood_text);
  const std::shared_ptr<const Program> program =
      find_program(op, network_text, parameters, dim, likelihood, Norms::kFolded);
  check_room(op, "z", *program, codes);
  const Network network(op, *program, likelihood, parameters, z_in);
  check_like(op, "x", x_in, z_in, "z");
  check_sizes(op, "x", x_in, {codes, observed_numel(op, *program, likelihood)});
  check_like(op, "cotangent", cotangent, z_in, "z");
  check_sizes(op, "cotangent", cotangent, {codes});
  FASTVAE_CHECK_VALUE(needs.size() == parameters.size(), op, "needs", c10::str(parameters.size(), " flags"),
                      needs.size());
  const at::Tensor z = z_in.contiguous(), grad_z = aten::empty({codes, dim}, z.options());
  std::vector<at::Tensor> gradients(parameters.size());
  if (codes > 0) {
    const Tape tape =
        network.with_reverse_room(network.forward_tape(reused({codes * program->forward_numel()}, z.options()), codes));
    network.forward_residual(z, network.observed_to_rows(x_in), tape, {});
    at::Tensor residual = tape.delta.back().view({codes, -1});
    residual.mul_(cotangent.unsqueeze(1));
    network.reverse(tape);
    gradients = network.affine_gradients(z, tape, parameters, needs);
    const at::Tensor found = network.apply_transpose(0, tape.delta[0], grad_z.view({-1}));
    if (found.data_ptr() != grad_z.data_ptr()) {
      grad_z.copy_(found.view(grad_z.sizes()));
    }
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!gradients[i].defined()) {
      gradients[i] = needs[i] != 0 ? aten::zeros(parameters[i].sizes(), z.options()) : aten::empty({0}, z.options());
    }
  }
  return {grad_z, std::move(gradients)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae_internal, m) {
  define_internal<&log_px_pullback>(
      m,
      "log_px_pullback(Tensor z, Tensor x, Tensor cotangent, Tensor[] parameters, str network, str likelihood, "
      "int[] needs) -> (Tensor, Tensor[])");
}

}  // namespace fastvae
