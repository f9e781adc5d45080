// The raw functions behind torch.ops.fastvae and fastvae._C. Schemas stand in registration.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include "../network/network.h"

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace fastvae {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> leapfrog_kick_drift(const at::Tensor& z, const at::Tensor& rho,
                                                       const at::Tensor& force, const at::Tensor& step_size);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> leapfrog_kick_drift_backward(
    const at::Tensor& grad_z_next, const at::Tensor& grad_rho_half, const at::Tensor& z, const at::Tensor& rho,
    const at::Tensor& force, const at::Tensor& step_size);

at::Tensor leapfrog_kick_temper(const at::Tensor& rho_half, const at::Tensor& force, const at::Tensor& step_size,
                                const at::Tensor& alpha);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> leapfrog_kick_temper_backward(
    const at::Tensor& grad_rho_next, const at::Tensor& rho_half, const at::Tensor& force, const at::Tensor& step_size,
    const at::Tensor& alpha);

// KL(q || p) [B] between diagonal Gaussians; without mu_p and logvar_p, p is standard normal.
at::Tensor gaussian_kl(const at::Tensor& mu_q, const at::Tensor& logvar_q, const OptionalTensor& mu_p,
                       const OptionalTensor& logvar_p);
// Gradients to the four (the last two empty where there is no p).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_kl_backward(const at::Tensor& grad,
                                                                                const at::Tensor& mu_q,
                                                                                const at::Tensor& logvar_q,
                                                                                const OptionalTensor& mu_p,
                                                                                const OptionalTensor& logvar_p);

// z_K, rho_K, log_px; every step's z, rho [K + 1, B, d] and, if asked, log_px [K + 1, B]; the stash.
using FlowOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
FlowOutputs hamiltonian_flow(const at::Tensor& z, const at::Tensor& rho, const at::Tensor& x,
                             const at::Tensor& step_size, const at::Tensor& alpha, at::TensorList parameters,
                             std::string_view network, std::string_view likelihood, bool store, bool trajectory);

// Gradients to z, rho, x, step_size, alpha (empty where not needed) and to the parameters.
using FlowGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;
FlowGradients hamiltonian_flow_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_rho,
                                        const OptionalTensor& grad_log_px, const at::Tensor& z, const at::Tensor& rho,
                                        const at::Tensor& x, const at::Tensor& step_size, const at::Tensor& alpha,
                                        at::TensorList parameters, const at::Tensor& z_steps,
                                        const at::Tensor& rho_steps, const at::Tensor& stash, std::string_view network,
                                        std::string_view likelihood, bool store, at::IntArrayRef needs);

// For TracIn: the factors of per-sample gradients to the decoder's parameters. Not ops: nothing differentiates them.
struct FlowFactors {
  at::Tensor grad_z, grad_rho;         // [B, d]
  at::Tensor step_terms, alpha_terms;  // [K, B, d]: gradients to each sample's own step sizes; the sum over d, to alpha
  std::vector<StageFactors> stages;    // [K + 1, B, ...]
};
FlowFactors hamiltonian_flow_factors(const OptionalTensor& grad_z, const OptionalTensor& grad_rho,
                                     const OptionalTensor& grad_log_px, const at::Tensor& z, const at::Tensor& rho,
                                     const at::Tensor& x, const at::Tensor& step_size, const at::Tensor& alpha,
                                     at::TensorList parameters, const at::Tensor& z_steps, const at::Tensor& rho_steps,
                                     std::string_view network, std::string_view likelihood);

// log p(x | z) [B], its gradient to z [B, d], and its factors.
std::tuple<at::Tensor, at::Tensor, std::vector<StageFactors>> decoder_factors(const at::Tensor& z, const at::Tensor& x,
                                                                              at::TensorList parameters,
                                                                              std::string_view network,
                                                                              std::string_view likelihood);

// log p(x | z) [B] and its gradient to z [B, d].
std::tuple<at::Tensor, at::Tensor> decoder_gradient(const at::Tensor& z, const at::Tensor& x, at::TensorList parameters,
                                                    std::string_view network, std::string_view likelihood);

// The terms of a VAE's ELBO at z = mu + exp(logvar / 2) noise: log p(x | z) [S, B], KL(q(z | x) || N(0, I)) [B], mu and
// logvar [B, d], z [S, B, d]; and what the reverse sweeps take of encoder and decoder (empty unless `store`). x [B, n]
// is what the encoder reads and the likelihood observes; the encoder gives [B, 2 d], mean before log variance; noise
// [S, B, d].
using ElboTerms = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ElboTerms elbo_terms(const at::Tensor& x, const at::Tensor& noise, at::TensorList encoder_parameters,
                     at::TensorList decoder_parameters, std::string_view encoder, std::string_view decoder,
                     std::string_view likelihood, bool store);

// Numbers that are stored of the encoder for a sample, and of the decoder for a code.
std::tuple<int64_t, int64_t> elbo_terms_stash(std::string_view encoder, std::string_view decoder,
                                              std::string_view likelihood, const TensorShapes& encoder_shapes,
                                              const TensorShapes& decoder_shapes, int64_t elements, int64_t latent_dim);

// Gradients to the parameters of encoder and decoder, empty where not needed.
using ElboGradients = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;
ElboGradients elbo_terms_backward(const OptionalTensor& grad_log_px, const OptionalTensor& grad_kl,
                                  const OptionalTensor& grad_mu, const OptionalTensor& grad_logvar,
                                  const OptionalTensor& grad_z, const at::Tensor& x, const at::Tensor& noise,
                                  const at::Tensor& mu, const at::Tensor& logvar, const at::Tensor& z,
                                  const at::Tensor& encoder_stash, const at::Tensor& decoder_stash,
                                  at::TensorList encoder_parameters, at::TensorList decoder_parameters,
                                  std::string_view encoder, std::string_view decoder, std::string_view likelihood,
                                  at::IntArrayRef needs);

// The gradients of  cotangent . log p(x | z)  to z [N, d] and to the parameters (empty where not needed), for cotangent
// [N] and x [N, n].
std::tuple<at::Tensor, std::vector<at::Tensor>> log_px_pullback(const at::Tensor& z, const at::Tensor& x,
                                                                const at::Tensor& cotangent, at::TensorList parameters,
                                                                std::string_view network, std::string_view likelihood,
                                                                at::IntArrayRef needs);

// The factors of the encoder's and the decoder's gradients, of the loss beta KL - log p(x | z) of each of x [B, n],
// averaged over the draws noise [B S, d] of z = mu + exp(logvar / 2) noise. The encoder reads x and gives [B, 2 d].
std::tuple<std::vector<StageFactors>, std::vector<StageFactors>> vae_factors(
    const at::Tensor& x, const at::Tensor& noise, double beta, at::TensorList encoder_parameters,
    std::string_view encoder, at::TensorList decoder_parameters, std::string_view decoder, std::string_view likelihood);

// Noise keyed by sample (kernels/keyed_noise.h): int64 keys [B] of x [B, ...]'s bytes; numbers first .. first + count -
// 1 of each of int64 keys [rows], [rows, count], as bits (int64) or standard normal (float64).
at::Tensor sample_keys(const at::Tensor& x);
at::Tensor keyed_bits(const at::Tensor& keys, int64_t first, int64_t count);
at::Tensor keyed_normal(const at::Tensor& keys, int64_t first, int64_t count);

// Whether the tensors of two lists are pairwise the same, on a CPU bit by bit.
bool same_bits(at::TensorList a, at::TensorList b);

// Gradients of each sample to a convolution's weight, CPU: [samples, kh kw, C of larger, C of smaller]; `larger` is
// what the window moves over (a convolution's input, a transposed one's output gradient).
at::Tensor convolution_gradients(const at::Tensor& larger, const at::Tensor& smaller, at::IntArrayRef kernel,
                                 at::IntArrayRef stride, at::IntArrayRef padding, int64_t samples);

// The size of hamiltonian_flow's stash: numbers a sample and step, and what the number of samples is rounded up to.
// cuda_index: of the GPU, or negative for the CPU.
std::tuple<int64_t, int64_t> hamiltonian_flow_stash(std::string_view network, std::string_view likelihood,
                                                    const std::vector<std::vector<int64_t>>& shapes, int64_t latent_dim,
                                                    int64_t element_size, int64_t cuda_index);

// [N, M], summed over layers; factors [N or M, (T,) features], bias a flag a layer.
at::Tensor grad_dot(at::TensorList inputs_a, at::TensorList output_grads_a, at::TensorList inputs_b,
                    at::TensorList output_grads_b, at::IntArrayRef bias);
// Gradients to the four lists, one after the other; empty where not needed.
std::vector<at::Tensor> grad_dot_backward(const at::Tensor& grad, at::TensorList inputs_a,
                                          at::TensorList output_grads_a, at::TensorList inputs_b,
                                          at::TensorList output_grads_b, at::IntArrayRef bias, at::IntArrayRef needs);

// log p(x | z) [S, B] for z [S, B, d] and x [B, elements].
at::Tensor log_px(const at::Tensor& z, const at::Tensor& x, at::TensorList parameters, std::string_view network,
                  std::string_view likelihood);

// The sum of |dy/dz|^p for each sample, reduced: [] or [B].
at::Tensor jacobian_l1(const at::Tensor& z, at::TensorList parameters, std::string_view network,
                       at::IntArrayRef latents, int64_t p, std::string_view reduction);

// The same, and the gradient to z and the parameters (empty where not needed): of the reduced value or, with reduction
// "none", of cotangent . value.
using JacobianGradients = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>>;
JacobianGradients jacobian_l1_with_gradient(const OptionalTensor& cotangent, const at::Tensor& z,
                                            at::TensorList parameters, std::string_view network,
                                            at::IntArrayRef latents, int64_t p, std::string_view reduction,
                                            at::IntArrayRef needs);

}  // namespace fastvae
