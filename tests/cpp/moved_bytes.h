// What a launch has to move: every number of its arrays that it reads or writes once, whatever stays in a cache.
#pragma once

#include "../../csrc/kernels/kernels.h"

namespace fastvae {

// How many of the arrays are there.
template <typename... Pointers>
int64_t given(const Pointers*... arrays) {
  return (static_cast<int64_t>(arrays != nullptr) + ... + 0);
}

inline int64_t large_image(const ConvolutionWindow& w) { return w.big_height * w.big_width * w.channels; }
inline int64_t patches(const ConvolutionWindow& w) {
  return w.height * w.width * w.kernel_height * w.kernel_width * w.channels;
}

// In numbers of type T; a kernel's other arguments come behind and are not counted.

template <typename Args>
  requires requires(const Args& a) { a.moved_numbers(); }
int64_t moved_numbers(const Args& a) {
  return a.moved_numbers();  // of a kernel with a header of its own
}
template <typename T>
int64_t moved_numbers(const Unfold<T>& a) {
  return a.samples * (large_image(a.window) + patches(a.window));
}
template <typename T>
int64_t moved_numbers(const Fold<T>& a) {
  return a.samples * (large_image(a.window) + patches(a.window));
}
template <typename T>
int64_t moved_numbers(const BiasActivation<T>& a) {
  return a.rows * a.channels * given(a.a, a.h, a.kept) + a.channels * given(a.bias);
}
template <typename T>
int64_t moved_numbers(const ActivationReverse<T>& a) {
  return a.size * 3;
}
template <typename T>
int64_t moved_numbers(const ActivationTangent<T>& a) {
  return a.size * (3 + 2 * given(a.curvature));
}
template <typename T>
int64_t moved_numbers(const ActivationAdjoint<T>& a) {
  return a.size * given(a.g, a.s, a.curvature, a.delta_dot);
}
inline int64_t observed_per_number(const LikelihoodSpec& likelihood) {
  return likelihood.kind == Likelihood::kCategorical ? likelihood.classes : 1;
}
template <typename T>
int64_t moved_numbers(const HeadResidual<T>& a) {
  const int64_t numbers = a.samples * a.positions * a.channels;
  return numbers * given(a.a, a.residual) + numbers / observed_per_number(a.likelihood) + a.channels * given(a.bias) +
         a.samples * given(a.log_prob);
}
template <typename T>
int64_t moved_numbers(const HeadTangent<T>& a) {
  const int64_t numbers = a.samples * a.positions * a.channels;
  return numbers * (3 + 2 * given(a.grad_x)) + numbers / observed_per_number(a.likelihood) +
         a.samples * given(a.cotangent);
}
template <typename T>
int64_t moved_numbers(const KickDrift<T>& a) {
  return a.samples * a.dim * 5;
}
template <typename T>
int64_t moved_numbers(const KickTemper<T>& a) {
  return a.samples * a.dim * given(a.rho_half, a.force, a.z, a.rho_next, a.force_out);
}
template <typename T>
int64_t moved_numbers(const KickTemperBackward<T>& a) {
  return a.samples * a.dim *
         given(a.grad, a.rho_half, a.force, a.pending, a.grad_momentum, a.grad_force, a.alpha_terms, a.step_terms);
}
template <typename T>
int64_t moved_numbers(const KickDriftBackward<T>& a) {
  const int64_t arrays = given(a.grad_z, a.grad_rho_half, a.hessian, a.through_force, a.rho, a.force, a.grad_rho_next,
                               a.force_next, a.grad_z_out, a.grad_rho, a.grad_force, a.step_terms, a.alpha_terms);
  return a.samples * a.dim * (arrays + (a.accumulate_step ? given(a.step_terms) : 0));
}
template <typename T>
int64_t moved_numbers(const GaussianKl<T>& a) {
  return a.samples * (a.dim * given(a.mu_q, a.logvar_q, a.mu_p, a.logvar_p) + 1);
}
template <typename T>
int64_t moved_numbers(const GaussianKlBackward<T>& a) {
  return a.samples * (a.dim * given(a.mu_q, a.logvar_q, a.mu_p, a.logvar_p, a.grad_mu_q, a.grad_logvar_q, a.grad_mu_p,
                                    a.grad_logvar_p) +
                      1);
}
template <typename T>
int64_t moved_numbers(const JacobianTangent<T>& a) {
  const int64_t numbers = a.latents * a.numel;
  return a.samples * (numbers + a.numel * given(a.s)) + numbers * (a.shared ? 1 : a.samples);
}
template <typename T>
int64_t moved_numbers(const JacobianHead<T>& a) {
  return a.samples * (a.latents * a.numel * given(a.adot, a.adotbar) + a.numel * given(a.s, a.abar) + given(a.weight) +
                      jacobian_chunks(a.numel));
}
template <typename T>
int64_t moved_numbers(const JacobianAdjoint<T>& a) {
  const int64_t numbers = a.latents * a.numel;
  return a.samples * (numbers * 2 + a.numel * given(a.s, a.hbar, a.abar)) +
         numbers * given(a.e) * (a.shared ? 1 : a.samples);
}
template <typename T>
int64_t moved_numbers(const GramProduct<T>& a) {
  return a.samples_a * a.samples_b * (a.terms_a * a.terms_b * 2 + (a.accumulate ? 2 : 1));
}
template <typename T>
int64_t moved_numbers(const AdamUpdate<T>& a) {
  return a.size * 7;
}
// Every row taken for one whose input is not zero.
template <typename T>
int64_t moved_numbers(const CopiedRows<T>& a) {
  return a.samples * a.rows() * a.out * 6;
}
template <typename T>
int64_t moved_numbers(const CopiesProduct<T>& a) {
  return a.layer.samples * (a.layer.rows() * a.layer.out + a.layer.in + a.layer.out);
}
template <typename T>
int64_t moved_numbers(const CopiesUpdate<T>& a) {
  return moved_numbers(a.layer) +
         a.layer.samples * (a.layer.in * given(a.h, a.grad_h) + a.layer.out * given(a.delta, a.next));
}
template <typename T>
int64_t moved_numbers(const CopiesCatchUp<T>& a) {
  return moved_numbers(a.layer);
}
template <typename T>
int64_t moved_numbers(const CopiesNorm<T>& a) {
  return a.samples * a.channels * (a.positions * 2 + 2);
}
template <typename T>
int64_t moved_numbers(const CopiesNormReverse<T>& a) {
  return a.samples * a.channels * (a.positions * given(a.delta, a.h, a.grad_h) + 3);
}
template <typename T>
int64_t parameters(const SmallNetwork<T>& network) {
  int64_t numbers = 0;
  for (int l = 0; l < network.depth; ++l) {
    numbers += network.out[l] * (network.in[l] + given(network.bias[l]));
  }
  return numbers;
}
template <typename T>
int64_t moved_numbers(const SmallFlow<T>& a) {
  const int64_t outputs = a.network.out[a.network.depth - 1];
  return parameters(a.network) + a.samples * (2 * a.dim + outputs + 1) +
         (a.steps + 1) * a.samples *
             (2 * a.dim + given(a.log_px_steps) + small_point_layout(a.network, a.dim).numel * given(a.tape));
}
template <typename T>
int64_t moved_numbers(const SmallFlowBackward<T>& a) {
  const int64_t outputs = a.network.out[a.network.depth - 1];
  return parameters(a.network) + a.tasks * small_flow_parameter_numel(a.network) * given(a.grad_parameters) +
         a.samples * (outputs * given(a.x, a.grad_x) + a.dim * given(a.grad_z_in, a.grad_rho_in, a.grad_z, a.grad_rho) +
                      given(a.grad_log_px) + a.steps * (a.dim * given(a.step_terms) + given(a.alpha_terms)) +
                      (a.steps + 1) * small_point_layout(a.network, a.dim).numel);
}
template <typename T>
int64_t moved_numbers(const SmallFlowSum<T>& a) {
  int64_t numbers = 0;
  for (int l = 0; l < a.depth; ++l) {
    numbers += a.out[l] * (a.in[l] * given(a.weight[l]) + given(a.bias[l]));
  }
  return numbers * (a.tasks + 2);
}

template <template <typename> typename Arguments, typename T, typename... Others>
int64_t moved_bytes(const Arguments<T>& arguments, const Others&...) {
  return moved_numbers(arguments) * static_cast<int64_t>(sizeof(T));
}
// Their rules say how many outputs an element has.
template <typename T, typename Rules>
int64_t moved_bytes(const ElementHeadResidual<T>& a, const Rules&, const int64_t&) {
  const int64_t of_element = Rules::kOutputs * given(a.y, a.residual) + given(a.x, a.weight);
  return a.samples * (a.size * of_element + given(a.log_prob)) * static_cast<int64_t>(sizeof(T));
}
template <typename T, typename Rules>
int64_t moved_bytes(const ElementHeadTangent<T>& a, const Rules&, const int64_t&) {
  const int64_t of_element = Rules::kOutputs * given(a.y, a.dot, a.residual, a.delta_dot) + given(a.x, a.weight);
  return a.samples * (a.size * of_element + given(a.cotangent)) * static_cast<int64_t>(sizeof(T));
}
inline int64_t moved_bytes(const SampleKeys& a) { return a.samples * (a.row_bytes + 8); }
inline int64_t moved_bytes(const KeyedNumbers& a) { return a.rows * (a.count + 1) * 8; }
// sum_chunks
template <typename T>
int64_t moved_bytes(const T*, const T*, int64_t rows, int64_t chunks, int64_t width) {
  return rows * (chunks + 1) * width * static_cast<int64_t>(sizeof(T));
}

}  // namespace fastvae
