// A leapfrog trajectory through log p(x, z) = ll(f(z); x) - |z|^2 / 2, and its gradient in closed form.
//
// Forward: K + 1 forward and reverse sweeps. Backward: K + 1 tangent and adjoint sweeps, walking the steps from the
// last to the first; ll(z_K) enters as a cotangent of the last force, so the final decode costs nothing.

#include <algorithm>
#include <limits>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/operator.h"
#include "../common/recycling.h"
#include "../common/replay.h"
#include "flow.h"

namespace fastvae {
namespace {

// [], [1], [d], [K, 1] or [K, d] to [K, d].
at::Tensor expand_step_size(const char* op, const at::Tensor& step_size, int64_t steps, int64_t dim) {
  const at::IntArrayRef sizes = step_size.sizes();
  const bool fits = sizes.empty() || (sizes.size() <= 2 && (sizes.back() == 1 || sizes.back() == dim) &&
                                      (sizes.size() == 1 || sizes[0] == 1 || sizes[0] == steps));
  FASTVAE_CHECK_VALUE(
      fits, op, "step_size", c10::str("a number, [d], [K, 1] or [K, d] with K = ", steps, " and d = ", dim),
      c10::str(describe(step_size),
               sizes == at::IntArrayRef{steps} ? "; for one step size a step pass step_size[:, None]" : ""));
  return step_size.expand({steps, dim}).contiguous();
}

}  // namespace

StashShape flow_stash_shape(const Program& program, const LikelihoodSpec& likelihood, int64_t dim, int64_t element_size,
                            at::Device device) {
  return takes_small_flow(program, likelihood, dim, element_size, device) ? small_flow_stash(program, dim, element_size)
                                                                          : StashShape{program.tape_numel() + dim, 1};
}

Flow::Flow(const char* op_in, const at::Tensor& z_in, const at::Tensor& rho_in, const at::Tensor& x_in,
           const at::Tensor& step_in, const at::Tensor& alpha_in, at::TensorList parameters_in,
           std::string_view network_text, std::string_view likelihood_text, Norms norms)
    : op(op_in),
      likelihood(parse_likelihood(op, likelihood_text)),
      program(find_program(op, network_text, parameters_in, checked_dim(op, z_in), likelihood, norms)),
      parameters(parameters_in) {
  for (const at::Tensor& tensor : parameters) {
    check_like(op, "parameters", tensor, z_in, "z");
  }
  samples = z_in.size(0);
  dim = z_in.size(1);
  check_like(op, "rho", rho_in, z_in, "z");
  check_sizes(op, "rho", rho_in, z_in.sizes());
  check_like(op, "alpha", alpha_in, z_in, "z");
  FASTVAE_CHECK_VALUE(alpha_in.dim() == 1 && alpha_in.size(0) > 0, op, "alpha", "shape [K] with K > 0",
                      describe(alpha_in));
  steps = alpha_in.size(0);
  check_like(op, "step_size", step_in, z_in, "z");
  check_like(op, "x", x_in, z_in, "z");
  check_sizes(op, "x", x_in, {samples, observed_numel(op, *program, likelihood)});
  check_room(op, "z", *program, samples, steps + 1);
  z = z_in.contiguous();
  rho = rho_in.contiguous();
  x = x_in.contiguous();
  step_size = expand_step_size(op, step_in, steps, dim);
  alpha = alpha_in.contiguous();
}

FlowCotangents Flow::cotangents(const std::optional<at::Tensor>& grad_z, const std::optional<at::Tensor>& grad_rho,
                                const std::optional<at::Tensor>& grad_log_px) const {
  const auto checked = [&](const std::optional<at::Tensor>& grad, const char* name, at::IntArrayRef sizes) {
    if (!grad.has_value()) {
      return at::Tensor();
    }
    check_like(op, name, *grad, z, "z");
    check_sizes(op, name, *grad, sizes);
    return grad->contiguous();
  };
  return {checked(grad_z, "grad_z", {samples, dim}), checked(grad_rho, "grad_rho", {samples, dim}),
          checked(grad_log_px, "grad_log_px", {samples})};
}

at::Tensor Flow::saved(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) const {
  check_like(op, name, tensor, z, "z");
  check_sizes(op, name, tensor, sizes);
  return tensor.contiguous();
}

FlowPath Flow::path(const at::Tensor& z_steps, const at::Tensor& rho_steps, const at::Tensor& stash, bool store) const {
  return {saved("z_steps", z_steps, {steps + 1, samples, dim}),
          saved("rho_steps", rho_steps, {steps + 1, samples, dim}),
          {},
          {},
          saved("stash", stash, {store ? stash_numel() : 0})};
}

bool FlowResult::wants_parameters() const {
  return std::any_of(parameters.begin(), parameters.end(), [](const at::Tensor& g) { return g.defined(); });
}

namespace {

// Numbers a sample and step that the flow stores, and what the number of samples is rounded up to. cuda_index: of the
// GPU, or negative for the CPU.
std::tuple<int64_t, int64_t> hamiltonian_flow_stash(std::string_view network, std::string_view likelihood,
                                                    const std::vector<std::vector<int64_t>>& shapes, int64_t latent_dim,
                                                    int64_t element_size, int64_t cuda_index) {
  constexpr const char* op = "hamiltonian_flow";
  const LikelihoodSpec head = parse_likelihood(op, likelihood);
  // Of a dtype that the operator refuses, too: it says so better.
  FASTVAE_CHECK_VALUE(element_size > 0 && element_size <= 16, op, "element_size", "1 to 16 bytes", element_size);
  FASTVAE_CHECK_VALUE(cuda_index <= std::numeric_limits<c10::DeviceIndex>::max(), op, "cuda_index",
                      "the index of a GPU, or a negative number", cuda_index);
  const at::Device device =
      cuda_index < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda_index));
  const StashShape shape = flow_stash_shape(Program(op, network, shapes, latent_dim, head, Norms::kFolded), head,
                                            latent_dim, element_size, device);
  return {shape.numel, shape.multiple};
}

bool runs_in_one_kernel(const Flow& flow, bool store) {
  return store && takes_small_flow(*flow.program, flow.likelihood, flow.dim, flow.z.element_size(), flow.z.device());
}

// z_K, rho_K, log_px; every step's z, rho [K + 1, B, d] and, if asked, log_px [K + 1, B]; the stash.
std::vector<at::Tensor> walked(const Flow& flow, bool store, bool trajectory) {
  const int64_t K = flow.steps, B = flow.samples, d = flow.dim;
  const at::TensorOptions options = flow.z.options();
  const FlowPath path{aten::empty({K + 1, B, d}, options), aten::empty({K + 1, B, d}, options),
                      aten::empty({B}, options), aten::empty({trajectory ? K + 1 : 0, B}, options),
                      reused({store ? flow.stash_numel() : 0}, options)};
  if (B > 0) {
    (runs_in_one_kernel(flow, store) ? run_small_flow : sweep_flow)(flow, path);
  }
  return {path.z_steps[K].clone(), path.rho_steps[K].clone(), path.log_px, path.z_steps,
          path.rho_steps,          path.log_px_steps,         path.stash};
}

using FlowOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
FlowOutputs hamiltonian_flow(const at::Tensor& z, const at::Tensor& rho, const at::Tensor& x,
                             const at::Tensor& step_size, const at::Tensor& alpha, at::TensorList parameters,
                             std::string_view network, std::string_view likelihood, bool store, bool trajectory) {
  constexpr const char* op = "hamiltonian_flow";
  constexpr size_t kOwned = 3;
  const EntryGuard guard(op, z);
  const auto walk = [=, network = lasting_text(network, z),
                     likelihood = lasting_text(likelihood, z)](const std::vector<at::Tensor>& in) {
    const Flow flow(op, in[0], in[1], in[2], in[3], in[4], at::TensorList(in).slice(5), network, likelihood,
                    Norms::kFolded);
    return walked(flow, store, trajectory);
  };
  const std::vector<at::Tensor> out =
      replayed({op, {network, likelihood}, {store ? 1 : 0, trajectory ? 1 : 0}},
               joined({z, rho, x, step_size, alpha}, parameters), {parameters.size(), 0}, kOwned, walk);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

// Gradients to z, rho, x, step_size, alpha (empty where not needed) and to the parameters.
std::vector<at::Tensor> walked_back(const Flow& flow, const FlowPath& path, const FlowCotangents& cotangents,
                                    bool store, at::IntArrayRef needs, const at::Tensor& x,
                                    const at::Tensor& step_size) {
  const int64_t K = flow.steps, B = flow.samples, d = flow.dim;
  const at::TensorOptions options = flow.z.options();
  const auto room = [&](bool wanted, at::IntArrayRef sizes) {
    return wanted ? aten::empty(sizes, options) : at::Tensor();
  };
  FlowResult out{room(true, {B, d}),
                 room(true, {B, d}),
                 needs[2] != 0,
                 room(needs[2] != 0 && B == 0, x.sizes()),
                 room(needs[3] != 0, {K, d}),
                 room(needs[4] != 0, {K}),
                 {}};
  for (size_t i = 0; i < flow.parameters.size(); ++i) {
    out.parameters.push_back(needs[5 + i] != 0 ? reused(flow.parameters[i].sizes(), options).zero_() : at::Tensor());
  }
  if (B > 0) {
    (runs_in_one_kernel(flow, store) ? run_small_flow_backward : sweep_flow_backward)(flow, path, cotangents, out);
  } else {
    for (const at::Tensor& gradient : {out.step_size, out.alpha}) {
      if (gradient.defined()) {
        gradient.zero_();
      }
    }
  }
  // Each its own tensor, also where nothing is wanted: outputs of an op must not alias.
  const auto wanted = [&](bool need, const at::Tensor& gradient) {
    return need ? gradient : aten::empty({0}, options);
  };
  std::vector<at::Tensor> found{
      wanted(needs[0] != 0, out.z), wanted(needs[1] != 0, out.rho), wanted(needs[2] != 0, out.x),
      needs[3] != 0 ? out.step_size.sum_to_size(step_size.sizes()) : aten::empty({0}, options),
      wanted(needs[4] != 0, out.alpha)};
  for (const at::Tensor& gradient : out.parameters) {
    found.push_back(wanted(gradient.defined(), gradient));
  }
  return found;
}

using FlowGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;
FlowGradients hamiltonian_flow_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_rho,
                                        const OptionalTensor& grad_log_px, const at::Tensor& z, const at::Tensor& rho,
                                        const at::Tensor& x, const at::Tensor& step_size, const at::Tensor& alpha,
                                        at::TensorList parameters, const at::Tensor& z_steps,
                                        const at::Tensor& rho_steps, const at::Tensor& stash, std::string_view network,
                                        std::string_view likelihood, bool store, at::IntArrayRef needs) {
  constexpr const char* op = "hamiltonian_flow_backward";
  const EntryGuard guard(op, z);
  const size_t count = parameters.size();
  FASTVAE_CHECK_VALUE(needs.size() == 5 + count, op, "needs", c10::str(5 + count, " flags"), needs.size());
  const auto walk_back = [=, network = lasting_text(network, z), likelihood = lasting_text(likelihood, z),
                          needs = needs.vec()](const std::vector<at::Tensor>& in) {
    const at::Tensor &of_x = in[5], &steps = in[6];
    const Flow flow(op, in[3], in[4], of_x, steps, in[7], at::TensorList(in).slice(8, count), network, likelihood,
                    Norms::kFolded);
    const FlowPath path = flow.path(in[8 + count], in[9 + count], in[10 + count], store);
    FASTVAE_CHECK_VALUE(!flow.likelihood.is_discrete() || !needs[2], op, "x",
                        "no gradient (a class and a count have none)", "x.requires_grad");
    return walked_back(flow, path, flow.cotangents(optional_of(in[0]), optional_of(in[1]), optional_of(in[2])), store,
                       needs, of_x, steps);
  };
  const std::vector<at::Tensor> in = joined({grad_z.value_or(at::Tensor()), grad_rho.value_or(at::Tensor()),
                                             grad_log_px.value_or(at::Tensor()), z, rho, x, step_size, alpha},
                                            flattened(parameters, z_steps, rho_steps, stash));
  std::vector<int64_t> numbers = needs.vec();
  numbers.push_back(store ? 1 : 0);
  // What the way there has left lies at another place each time, unless that came from a graph, too.
  std::vector<at::Tensor> out = is_under_lease(z_steps) ? replayed({op, {network, likelihood}, numbers}, in, {count, 3},
                                                                   /*owned=*/in.size(), walk_back)
                                                        : walk_back(in);
  std::vector<at::Tensor> of_parameters(out.begin() + 5, out.end());
  return {out[0], out[1], out[2], out[3], out[4], std::move(of_parameters)};
}

struct FlowGradient {
  static constexpr std::array<size_t, 3> kKept{3, 4, 6};  // z_steps, rho_steps and the stash
  static constexpr size_t kDifferentiable = 3;
  static constexpr bool kZeros = false;

  static variable_list gradient(const Recorded<7>& recorded, const at::Tensor& z, const at::Tensor& rho,
                                const at::Tensor& x, const at::Tensor& step_size, const at::Tensor& alpha,
                                at::TensorList parameters, std::string_view network, std::string_view likelihood,
                                bool store, bool /*trajectory*/) {
    return flattened(Op<&hamiltonian_flow_backward>::call(
        optional_of(recorded.grads[0]), optional_of(recorded.grads[1]), optional_of(recorded.grads[2]), z, rho, x,
        step_size, alpha, parameters, recorded.kept[0], recorded.kept[1], recorded.kept[2], network, likelihood, store,
        recorded.needs));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_operator<&hamiltonian_flow>(
      m,
      "hamiltonian_flow(Tensor z, Tensor rho, Tensor x, Tensor step_size, Tensor alpha, Tensor[] parameters, "
      "str network, str likelihood, bool store, bool trajectory) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      differentiable<&hamiltonian_flow, FlowGradient>());
  define_operator<&hamiltonian_flow_backward>(
      m,
      "hamiltonian_flow_backward(Tensor? grad_z, Tensor? grad_rho, Tensor? grad_log_px, Tensor z, Tensor rho, "
      "Tensor x, Tensor step_size, Tensor alpha, Tensor[] parameters, Tensor z_steps, Tensor rho_steps, Tensor stash, "
      "str network, str likelihood, bool store, int[] needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
      differentiated_once("hamiltonian_flow"));
}

TORCH_LIBRARY_FRAGMENT(fastvae_internal, m) {
  define_internal<&hamiltonian_flow_stash>(
      m,
      "hamiltonian_flow_stash(str network, str likelihood, int[][] shapes, int latent_dim, int element_size, "
      "int cuda_index) -> (int, int)");
}

}  // namespace fastvae
