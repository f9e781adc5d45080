// fastvae._C: what this build is, and the raw functions of the operators (no autograd, no autocast, no dispatcher),
// bound with the GIL released.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/autograd.h"
#include "common/recycling.h"
#include "kernels/kernels.h"
#include "network/copies.h"
#include "network/copies_adam.h"
#include "ops/copied_convolution.h"
#include "ops/norm_activation.h"
#include "ops/ops.h"
#include "straight_code.h"

namespace {

std::string cpu_instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
    return "AVX-512";
  }
  return __builtin_cpu_supports("avx2") ? "AVX2" : "SSE2";
#else
  return "portable";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
#ifdef FASTVAE_WITH_CUDA
  info["cuda"] = true;
  info["cuda_architectures"] = FASTVAE_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_architectures"] = "";
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef __clang__
  info["compiler"] = "Clang " __clang_version__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["cpu_instruction_set"] = cpu_instruction_set();
  return info;
}

// As (weight, bias, h, delta, hdot, delta_dot), the last two None without tangents.
pybind11::list as_list(const std::vector<fastvae::StageFactors>& stages) {
  const auto or_none = [](const at::Tensor& tensor) {
    return tensor.defined() ? pybind11::cast(tensor) : pybind11::object(pybind11::none());
  };
  pybind11::list found;
  for (const fastvae::StageFactors& stage : stages) {
    found.append(pybind11::make_tuple(stage.weight, stage.bias, stage.h, stage.delta, or_none(stage.hdot),
                                      or_none(stage.delta_dot)));
  }
  return found;
}

// A function of Python's, from cotangents and to gradients as lists with None in the place of zero.
class GradientInPython final : public fastvae::DifferentiableGradient {
 public:
  explicit GradientInPython(pybind11::function function) : function_(std::move(function)) {}
  GradientInPython(const GradientInPython&) = delete;
  GradientInPython& operator=(const GradientInPython&) = delete;
  ~GradientInPython() override {
    const pybind11::gil_scoped_acquire locked;  // it may die while nobody holds the lock
    function_ = pybind11::function();
  }
  fastvae::variable_list operator()(const fastvae::variable_list& cotangents, const at::Tensor& x,
                                    const at::Tensor& noise) const override {
    const pybind11::gil_scoped_acquire locked;
    pybind11::list given;
    for (const at::Tensor& cotangent : cotangents) {
      given.append(cotangent.defined() ? pybind11::cast(cotangent) : pybind11::object(pybind11::none()));
    }
    fastvae::variable_list found;
    for (const pybind11::handle gradient : pybind11::list(function_(given, x, noise))) {
      found.push_back(gradient.is_none() ? at::Tensor() : gradient.cast<at::Tensor>());
    }
    return found;
  }

 private:
  pybind11::function function_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  using pybind11::arg;
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.doc() = "Raw kernels of fastvae; use fastvae.ops.";
  m.def("build_info", &build_info, "What this shared object was built with.");
  fastvae::bind_straight_code(m);
  m.def("leapfrog_kick_drift", &fastvae::leapfrog_kick_drift, unlocked, arg("z"), arg("rho"), arg("force"),
        arg("step_size"));
  m.def("leapfrog_kick_drift_backward", &fastvae::leapfrog_kick_drift_backward, unlocked, arg("grad_z_next"),
        arg("grad_rho_half"), arg("z"), arg("rho"), arg("force"), arg("step_size"));
  m.def("leapfrog_kick_temper", &fastvae::leapfrog_kick_temper, unlocked, arg("rho_half"), arg("force"),
        arg("step_size"), arg("alpha"));
  m.def("leapfrog_kick_temper_backward", &fastvae::leapfrog_kick_temper_backward, unlocked, arg("grad_rho_next"),
        arg("rho_half"), arg("force"), arg("step_size"), arg("alpha"));
  m.def("gaussian_kl", &fastvae::gaussian_kl, unlocked, arg("mu_q"), arg("logvar_q"), arg("mu_p"), arg("logvar_p"));
  m.def("gaussian_kl_backward", &fastvae::gaussian_kl_backward, unlocked, arg("grad"), arg("mu_q"), arg("logvar_q"),
        arg("mu_p"), arg("logvar_p"));
  m.def(
      "hamiltonian_flow",
      [](const at::Tensor& z, const at::Tensor& rho, const at::Tensor& x, const at::Tensor& step_size,
         const at::Tensor& alpha, const std::vector<at::Tensor>& parameters, const std::string& network,
         const std::string& likelihood, bool store, bool trajectory) {
        return fastvae::hamiltonian_flow(z, rho, x, step_size, alpha, parameters, network, likelihood, store,
                                         trajectory);
      },
      unlocked, arg("z"), arg("rho"), arg("x"), arg("step_size"), arg("alpha"), arg("parameters"), arg("network"),
      arg("likelihood"), arg("store"), arg("trajectory"));
  m.def(
      "hamiltonian_flow_backward",
      [](const std::optional<at::Tensor>& grad_z, const std::optional<at::Tensor>& grad_rho,
         const std::optional<at::Tensor>& grad_log_px, const at::Tensor& z, const at::Tensor& rho, const at::Tensor& x,
         const at::Tensor& step_size, const at::Tensor& alpha, const std::vector<at::Tensor>& parameters,
         const at::Tensor& z_steps, const at::Tensor& rho_steps, const at::Tensor& stash, const std::string& network,
         const std::string& likelihood, bool store, const std::vector<int64_t>& needs) {
        return fastvae::hamiltonian_flow_backward(grad_z, grad_rho, grad_log_px, z, rho, x, step_size, alpha,
                                                  parameters, z_steps, rho_steps, stash, network, likelihood, store,
                                                  needs);
      },
      unlocked, arg("grad_z"), arg("grad_rho"), arg("grad_log_px"), arg("z"), arg("rho"), arg("x"), arg("step_size"),
      arg("alpha"), arg("parameters"), arg("z_steps"), arg("rho_steps"), arg("stash"), arg("network"),
      arg("likelihood"), arg("store"), arg("needs"));
  m.def(
      "hamiltonian_flow_stash",
      [](const std::string& network, const std::string& likelihood, const std::vector<std::vector<int64_t>>& shapes,
         int64_t latent_dim, int64_t element_size, int64_t cuda_index) {
        return fastvae::hamiltonian_flow_stash(network, likelihood, shapes, latent_dim, element_size, cuda_index);
      },
      arg("network"), arg("likelihood"), arg("shapes"), arg("latent_dim"), arg("element_size"), arg("cuda_index"),
      "Numbers a sample and step that the flow stores, and what the number of samples is rounded up to.");
  m.def(
      "grad_dot",
      [](const std::vector<at::Tensor>& inputs_a, const std::vector<at::Tensor>& output_grads_a,
         const std::vector<at::Tensor>& inputs_b, const std::vector<at::Tensor>& output_grads_b,
         const std::vector<int64_t>& bias) {
        return fastvae::grad_dot(inputs_a, output_grads_a, inputs_b, output_grads_b, bias);
      },
      unlocked, arg("inputs_a"), arg("output_grads_a"), arg("inputs_b"), arg("output_grads_b"), arg("bias"));
  m.def(
      "grad_dot_backward",
      [](const at::Tensor& grad, const std::vector<at::Tensor>& inputs_a, const std::vector<at::Tensor>& output_grads_a,
         const std::vector<at::Tensor>& inputs_b, const std::vector<at::Tensor>& output_grads_b,
         const std::vector<int64_t>& bias, const std::vector<int64_t>& needs) {
        return fastvae::grad_dot_backward(grad, inputs_a, output_grads_a, inputs_b, output_grads_b, bias, needs);
      },
      unlocked, arg("grad"), arg("inputs_a"), arg("output_grads_a"), arg("inputs_b"), arg("output_grads_b"),
      arg("bias"), arg("needs"));
  m.def(
      "hamiltonian_flow_factors",
      [](const std::optional<at::Tensor>& grad_z, const std::optional<at::Tensor>& grad_rho,
         const std::optional<at::Tensor>& grad_log_px, const at::Tensor& z, const at::Tensor& rho, const at::Tensor& x,
         const at::Tensor& step_size, const at::Tensor& alpha, const std::vector<at::Tensor>& parameters,
         const at::Tensor& z_steps, const at::Tensor& rho_steps, const std::string& network,
         const std::string& likelihood) {
        fastvae::FlowFactors found;
        {
          const pybind11::gil_scoped_release unlocked_here;
          found = fastvae::hamiltonian_flow_factors(grad_z, grad_rho, grad_log_px, z, rho, x, step_size, alpha,
                                                    parameters, z_steps, rho_steps, network, likelihood);
        }
        return pybind11::make_tuple(found.grad_z, found.grad_rho, found.step_terms, found.alpha_terms,
                                    as_list(found.stages));
      },
      arg("grad_z"), arg("grad_rho"), arg("grad_log_px"), arg("z"), arg("rho"), arg("x"), arg("step_size"),
      arg("alpha"), arg("parameters"), arg("z_steps"), arg("rho_steps"), arg("network"), arg("likelihood"));
  m.def(
      "decoder_factors",
      [](const at::Tensor& z, const at::Tensor& x, const std::vector<at::Tensor>& parameters,
         const std::string& network, const std::string& likelihood) {
        std::tuple<at::Tensor, at::Tensor, std::vector<fastvae::StageFactors>> found;
        {
          const pybind11::gil_scoped_release unlocked_here;
          found = fastvae::decoder_factors(z, x, parameters, network, likelihood);
        }
        return pybind11::make_tuple(std::get<0>(found), std::get<1>(found), as_list(std::get<2>(found)));
      },
      arg("z"), arg("x"), arg("parameters"), arg("network"), arg("likelihood"));
  m.def(
      "decoder_gradient",
      [](const at::Tensor& z, const at::Tensor& x, const std::vector<at::Tensor>& parameters,
         const std::string& network,
         const std::string& likelihood) { return fastvae::decoder_gradient(z, x, parameters, network, likelihood); },
      unlocked, arg("z"), arg("x"), arg("parameters"), arg("network"), arg("likelihood"));
  pybind11::class_<fastvae::NetworkCopies>(m, "NetworkCopies", "A copy of a network for each sample, trained by Adam.")
      .def(pybind11::init([](const std::string& network, const std::vector<at::Tensor>& parameters, const at::Tensor& x,
                             double lr, double beta1, double beta2, double eps, double weight_decay, int64_t steps) {
             return std::make_unique<fastvae::NetworkCopies>(
                 network, parameters, x, fastvae::AdamSettings{lr, beta1, beta2, eps, weight_decay}, steps);
           }),
           unlocked, arg("network"), arg("parameters"), arg("x"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
           arg("weight_decay"), arg("steps"))
      .def("forward", &fastvae::NetworkCopies::forward, unlocked)
      .def("update", &fastvae::NetworkCopies::update, unlocked, arg("grad"))
      .def("parameters", &fastvae::NetworkCopies::parameters, unlocked);
  pybind11::class_<fastvae::CopiesAdam>(m, "CopiesAdam", "Adam on the parameters of every sample, on a CPU.")
      .def(pybind11::init([](const std::vector<at::Tensor>& values, double lr, double beta1, double beta2, double eps,
                             double weight_decay) {
             return std::make_unique<fastvae::CopiesAdam>(
                 values, fastvae::AdamSettings{lr, beta1, beta2, eps, weight_decay});
           }),
           unlocked, arg("values"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"), arg("weight_decay"))
      .def("step", &fastvae::CopiesAdam::step, unlocked, arg("gradients"), arg("inputs"));
  using Copied = fastvae::CopiedConvolutionRules;
  pybind11::class_<Copied>(m, "CopiedConvolutionRules", "A convolution with weights of every sample's own, on a CPU.")
      .def(pybind11::init<const std::vector<int64_t>&, const std::vector<int64_t>&, const std::vector<int64_t>&,
                          const std::vector<int64_t>&, int64_t>(),
           arg("kernel"), arg("stride"), arg("padding"), arg("dilation"), arg("groups"))
      .def("smaller", &Copied::smaller, unlocked, arg("larger"), arg("weight"), arg("bias"))
      .def("larger", &Copied::larger, unlocked, arg("smaller"), arg("weight"), arg("bias"), arg("sizes"))
      .def("weight", &Copied::weight, unlocked, arg("larger"), arg("smaller"), arg("samples"));
  m.def(
      "vae_factors",
      [](const at::Tensor& x, const at::Tensor& noise, double beta, const std::vector<at::Tensor>& encoder_parameters,
         const std::string& encoder, const std::vector<at::Tensor>& decoder_parameters, const std::string& decoder,
         const std::string& likelihood) {
        std::tuple<std::vector<fastvae::StageFactors>, std::vector<fastvae::StageFactors>> found;
        {
          const pybind11::gil_scoped_release unlocked_here;
          found = fastvae::vae_factors(x, noise, beta, encoder_parameters, encoder, decoder_parameters, decoder,
                                       likelihood);
        }
        return pybind11::make_tuple(as_list(std::get<0>(found)), as_list(std::get<1>(found)));
      },
      arg("x"), arg("noise"), arg("beta"), arg("encoder_parameters"), arg("encoder"), arg("decoder_parameters"),
      arg("decoder"), arg("likelihood"));
  using Rules = fastvae::NormActivationRules;
  pybind11::class_<Rules>(m, "NormActivationRules", "The four rules of a norm and the activation behind it, on a CPU.")
      .def(pybind11::init<const std::string&, int64_t, double, const std::string&>(), arg("statistics"), arg("groups"),
           arg("eps"), arg("activation"))
      .def("forward", &Rules::forward, unlocked, arg("x"), arg("gain"), arg("bias"), arg("mean"), arg("s"))
      .def("reverse", &Rules::reverse, unlocked, arg("dy"), arg("x"), arg("gain"), arg("bias"), arg("mean"), arg("s"),
           arg("affine"))
      .def("tangent", &Rules::tangent, unlocked, arg("x_dot"), arg("x"), arg("gain"), arg("bias"), arg("mean"),
           arg("s"))
      .def("adjoint", &Rules::adjoint, unlocked, arg("dy_dot"), arg("dy"), arg("x_dot"), arg("x"), arg("gain"),
           arg("bias"), arg("mean"), arg("s"), arg("affine"));
  pybind11::class_<fastvae::Recycling>(m, "Recycling", "Inside, large results take the memory of those that died.")
      .def(pybind11::init<>())
      .def("__reduce__",
           [](const pybind11::object& self) {
             return pybind11::make_tuple(self.attr("__class__"), pybind11::tuple());  // a copy begins without memory
           })
      .def("__enter__", &fastvae::Recycling::enter)
      .def("__exit__", [](fastvae::Recycling& self, const pybind11::args&) { self.leave(); });
  m.def(
      "same_bits",
      [](const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) { return fastvae::same_bits(a, b); },
      unlocked, arg("a"), arg("b"));
  m.def("sample_keys", &fastvae::sample_keys, unlocked, arg("x"));
  m.def("keyed_bits", &fastvae::keyed_bits, unlocked, arg("keys"), arg("first"), arg("count"));
  m.def("keyed_normal", &fastvae::keyed_normal, unlocked, arg("keys"), arg("first"), arg("count"));
  m.def(
      "convolution_gradients",
      [](const at::Tensor& larger, const at::Tensor& smaller, const std::vector<int64_t>& kernel,
         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
         int64_t samples) { return fastvae::convolution_gradients(larger, smaller, kernel, stride, padding, samples); },
      unlocked, arg("larger"), arg("smaller"), arg("kernel"), arg("stride"), arg("padding"), arg("samples"));
  m.def(
      "differentiable_elbo_terms",
      [](const at::Tensor& x, const at::Tensor& noise, const std::vector<at::Tensor>& encoder_parameters,
         const std::vector<at::Tensor>& decoder_parameters, const std::string& encoder, const std::string& decoder,
         const std::string& likelihood, pybind11::function again) {
        const auto gradient = c10::make_intrusive<GradientInPython>(std::move(again));
        const pybind11::gil_scoped_release unlocked_here;
        return fastvae::differentiable_elbo_terms(x, noise, encoder_parameters, decoder_parameters, encoder, decoder,
                                                  likelihood, gradient);
      },
      arg("x"), arg("noise"), arg("encoder_parameters"), arg("decoder_parameters"), arg("encoder"), arg("decoder"),
      arg("likelihood"), arg("again"),
      "The operator elbo_terms with autograd; again: its gradient in operations that can be differentiated.");
  m.def(
      "elbo_terms_stash",
      [](const std::string& encoder, const std::string& decoder, const std::string& likelihood,
         const fastvae::TensorShapes& encoder_shapes, const fastvae::TensorShapes& decoder_shapes, int64_t elements,
         int64_t latent_dim) {
        return fastvae::elbo_terms_stash(encoder, decoder, likelihood, encoder_shapes, decoder_shapes, elements,
                                         latent_dim);
      },
      arg("encoder"), arg("decoder"), arg("likelihood"), arg("encoder_shapes"), arg("decoder_shapes"), arg("elements"),
      arg("latent_dim"), "Numbers that elbo_terms stores of the encoder for a sample, and of the decoder for a code.");
  m.def(
      "log_px_pullback",
      [](const at::Tensor& z, const at::Tensor& x, const at::Tensor& cotangent,
         const std::vector<at::Tensor>& parameters, const std::string& network, const std::string& likelihood,
         const std::vector<int64_t>& needs) {
        return fastvae::log_px_pullback(z, x, cotangent, parameters, network, likelihood, needs);
      },
      unlocked, arg("z"), arg("x"), arg("cotangent"), arg("parameters"), arg("network"), arg("likelihood"),
      arg("needs"));
  m.def(
      "log_px",
      [](const at::Tensor& z, const at::Tensor& x, const std::vector<at::Tensor>& parameters,
         const std::string& network,
         const std::string& likelihood) { return fastvae::log_px(z, x, parameters, network, likelihood); },
      unlocked, arg("z"), arg("x"), arg("parameters"), arg("network"), arg("likelihood"));
  m.def(
      "jacobian_l1",
      [](const at::Tensor& z, const std::vector<at::Tensor>& parameters, const std::string& network,
         const std::vector<int64_t>& latents, int64_t p,
         const std::string& reduction) { return fastvae::jacobian_l1(z, parameters, network, latents, p, reduction); },
      unlocked, arg("z"), arg("parameters"), arg("network"), arg("latents"), arg("p"), arg("reduction"));
  m.def(
      "jacobian_l1_with_gradient",
      [](const std::optional<at::Tensor>& cotangent, const at::Tensor& z, const std::vector<at::Tensor>& parameters,
         const std::string& network, const std::vector<int64_t>& latents, int64_t p, const std::string& reduction,
         const std::vector<int64_t>& needs) {
        return fastvae::jacobian_l1_with_gradient(cotangent, z, parameters, network, latents, p, reduction, needs);
      },
      unlocked, arg("cotangent"), arg("z"), arg("parameters"), arg("network"), arg("latents"), arg("p"),
      arg("reduction"), arg("needs"));
}
