// Every operator of fastvae, on one screen. Autograd is registered in autograd/; autocast and fake kernels, in
// fastvae/ops.
#include <torch/library.h>

#include "ops/ops.h"

TORCH_LIBRARY(fastvae, m) {
  m.def("leapfrog_kick_drift(Tensor z, Tensor rho, Tensor force, Tensor step_size) -> (Tensor, Tensor)");
  m.def(
      "leapfrog_kick_drift_backward(Tensor grad_z_next, Tensor grad_rho_half, Tensor z, Tensor rho, Tensor force, "
      "Tensor step_size) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("leapfrog_kick_temper(Tensor rho_half, Tensor force, Tensor step_size, Tensor alpha) -> Tensor");
  m.def(
      "leapfrog_kick_temper_backward(Tensor grad_rho_next, Tensor rho_half, Tensor force, Tensor step_size, "
      "Tensor alpha) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gaussian_kl(Tensor mu_q, Tensor logvar_q, Tensor? mu_p, Tensor? logvar_p) -> Tensor");
  m.def(
      "gaussian_kl_backward(Tensor grad, Tensor mu_q, Tensor logvar_q, Tensor? mu_p, Tensor? logvar_p) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "hamiltonian_flow(Tensor z, Tensor rho, Tensor x, Tensor step_size, Tensor alpha, Tensor[] parameters, "
      "str network, str likelihood, bool store, bool trajectory) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "hamiltonian_flow_backward(Tensor? grad_z, Tensor? grad_rho, Tensor? grad_log_px, Tensor z, Tensor rho, "
      "Tensor x, Tensor step_size, Tensor alpha, Tensor[] parameters, Tensor z_steps, Tensor rho_steps, Tensor stash, "
      "str network, str likelihood, bool store, int[] needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "grad_dot(Tensor[] inputs_a, Tensor[] output_grads_a, Tensor[] inputs_b, Tensor[] output_grads_b, int[] bias) "
      "-> Tensor");
  m.def(
      "grad_dot_backward(Tensor grad, Tensor[] inputs_a, Tensor[] output_grads_a, Tensor[] inputs_b, "
      "Tensor[] output_grads_b, int[] bias, int[] needs) -> Tensor[]");
  m.def(
      "elbo_terms(Tensor x, Tensor noise, Tensor[] encoder_parameters, Tensor[] decoder_parameters, str encoder, "
      "str decoder, str likelihood, bool store) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "elbo_terms_backward(Tensor? grad_log_px, Tensor? grad_kl, Tensor? grad_mu, Tensor? grad_logvar, "
      "Tensor? grad_z, Tensor x, Tensor noise, Tensor mu, Tensor logvar, Tensor z, Tensor encoder_stash, "
      "Tensor decoder_stash, Tensor[] encoder_parameters, Tensor[] decoder_parameters, str encoder, str decoder, "
      "str likelihood, int[] needs) -> (Tensor[], Tensor[])");
  m.def("log_px(Tensor z, Tensor x, Tensor[] parameters, str network, str likelihood) -> Tensor");
  m.def("jacobian_l1(Tensor z, Tensor[] parameters, str network, int[] latents, int p, str reduction) -> Tensor");
  m.def(
      "jacobian_l1_with_gradient(Tensor? cotangent, Tensor z, Tensor[] parameters, str network, int[] latents, int p, "
      "str reduction, int[] needs) -> (Tensor, Tensor, Tensor[])");
}

#define FASTVAE_IMPLEMENT(KEY)                                                        \
  TORCH_LIBRARY_IMPL(fastvae, KEY, m) {                                               \
    m.impl("leapfrog_kick_drift", &fastvae::leapfrog_kick_drift);                     \
    m.impl("leapfrog_kick_drift_backward", &fastvae::leapfrog_kick_drift_backward);   \
    m.impl("grad_dot", &fastvae::grad_dot);                                           \
    m.impl("grad_dot_backward", &fastvae::grad_dot_backward);                         \
    m.impl("leapfrog_kick_temper", &fastvae::leapfrog_kick_temper);                   \
    m.impl("leapfrog_kick_temper_backward", &fastvae::leapfrog_kick_temper_backward); \
    m.impl("gaussian_kl", &fastvae::gaussian_kl);                                     \
    m.impl("gaussian_kl_backward", &fastvae::gaussian_kl_backward);                   \
    m.impl("hamiltonian_flow", &fastvae::hamiltonian_flow);                           \
    m.impl("hamiltonian_flow_backward", &fastvae::hamiltonian_flow_backward);         \
    m.impl("elbo_terms", &fastvae::elbo_terms);                                       \
    m.impl("elbo_terms_backward", &fastvae::elbo_terms_backward);                     \
    m.impl("log_px", &fastvae::log_px);                                               \
    m.impl("jacobian_l1", &fastvae::jacobian_l1);                                     \
    m.impl("jacobian_l1_with_gradient", &fastvae::jacobian_l1_with_gradient);         \
  }

// On a build without CUDA kernels the same functions answer a CUDA tensor with an error that says what to do.
FASTVAE_IMPLEMENT(CPU)
FASTVAE_IMPLEMENT(CUDA)
