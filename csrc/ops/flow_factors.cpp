// What TracIn asks of a decoder: the factors of per-sample gradients to its parameters, from one sweep with its
// likelihood or from a whole Hamiltonian flow. Not ops: nothing differentiates them.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../common/guard.h"
#include "flow.h"
#include "ops.h"

namespace fastvae {

FlowFactors hamiltonian_flow_factors(const OptionalTensor& grad_z, const OptionalTensor& grad_rho,
                                     const OptionalTensor& grad_log_px, const at::Tensor& z, const at::Tensor& rho,
                                     const at::Tensor& x, const at::Tensor& step_size, const at::Tensor& alpha,
                                     at::TensorList parameters, const at::Tensor& z_steps, const at::Tensor& rho_steps,
                                     std::string_view network, std::string_view likelihood) {
  constexpr const char* op = "hamiltonian_flow_factors";
  const EntryGuard guard(op, {z, rho, x, step_size, alpha, z_steps, rho_steps});
  const Flow flow(op, z, rho, x, step_size, alpha, parameters, network, likelihood);
  const int64_t K = flow.steps, B = flow.samples, d = flow.dim;
  check_sizes(op, "z_steps", z_steps, {K + 1, B, d});
  check_sizes(op, "rho_steps", rho_steps, {K + 1, B, d});
  FASTVAE_CHECK_VALUE(B > 0, op, "z", "at least one sample", describe(z));
  const FlowCotangents cotangents = flow.cotangents(grad_z, grad_rho, grad_log_px);
  const auto room = [&](at::IntArrayRef sizes) { return at::empty(sizes, z.options()); };
  FlowFactors factors;
  FlowResult out{room({B, d}), room({B, d}), false, {}, room({K, d}), room({K}), {}};
  out.parameters.resize(parameters.size());
  out.factors = &factors;
  // Without the stash: the factors of all steps are wanted in any case.
  sweep_flow_backward(flow, {z_steps, rho_steps, {}, {}, room({0})}, cotangents, out);
  factors.grad_z = out.z;
  factors.grad_rho = out.rho;
  return factors;
}

namespace {

// One forward and reverse sweep through a decoder with its likelihood: the first point of a flow; no step is taken.
class DecoderSweep {
 public:
  DecoderSweep(const char* op, const at::Tensor& z, const at::Tensor& x, at::TensorList parameters,
               std::string_view network_text, std::string_view likelihood)
      : one_(at::zeros({1}, z.options())),
        flow_(op, z, z, x, one_, one_, parameters, network_text, likelihood),
        network_(op, *flow_.program, flow_.likelihood, flow_.parameters, flow_.z),
        log_px(at::empty({flow_.samples}, z.options())),
        tape_(network_.tape(at::empty({flow_.samples * flow_.program->tape_numel()}, z.options()), 1, flow_.samples, 0,
                            1)),
        grad_z(network_.forward_reverse(flow_.z, network_.observed_to_rows(flow_.x), tape_, log_px)) {}

  std::vector<StageFactors> factors() const { return network_.factors(flow_.z, {}, tape_, {}, 0); }

 private:
  at::Tensor one_;
  Flow flow_;
  Network network_;

 public:
  const at::Tensor log_px;  // [B]

 private:
  Tape tape_;

 public:
  const at::Tensor grad_z;  // [B, d]
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, std::vector<StageFactors>> decoder_factors(const at::Tensor& z, const at::Tensor& x,
                                                                              at::TensorList parameters,
                                                                              std::string_view network,
                                                                              std::string_view likelihood) {
  constexpr const char* op = "decoder_factors";
  const EntryGuard guard(op, {z, x});
  const DecoderSweep sweep(op, z, x, parameters, network, likelihood);
  return {sweep.log_px, sweep.grad_z, sweep.factors()};
}

std::tuple<at::Tensor, at::Tensor> decoder_gradient(const at::Tensor& z, const at::Tensor& x, at::TensorList parameters,
                                                    std::string_view network, std::string_view likelihood) {
  constexpr const char* op = "decoder_gradient";
  const EntryGuard guard(op, {z, x});
  const DecoderSweep sweep(op, z, x, parameters, network, likelihood);
  return {sweep.log_px, sweep.grad_z};
}

}  // namespace fastvae
