// What the two routes of hamiltonian_flow share: the checked inputs, the path, and its gradients. One route sweeps the
// network layer by layer (flow_sweeps.cpp), the other runs one kernel for the whole trajectory (small_flow.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "../network/network.h"

namespace fastvae {

// The size of the stash: numbers a sample and step, and what the number of samples is rounded up to.
struct StashShape {
  int64_t numel;
  int64_t multiple;
  int64_t total(int64_t samples, int64_t steps) const {
    return (steps + 1) * ((samples + multiple - 1) / multiple * multiple) * numel;
  }
};
StashShape flow_stash_shape(const Program& program, const LikelihoodSpec& likelihood, int64_t dim, int64_t element_size,
                            at::Device device);

// Undefined where there is none.
struct FlowCotangents {
  at::Tensor z, rho;  // [B, d]
  at::Tensor log_px;  // [B]
};

// What the forward pass writes.
struct FlowPath {
  at::Tensor z_steps, rho_steps;  // [K + 1, B, d]
  at::Tensor log_px;              // [B]
  at::Tensor log_px_steps;        // [K + 1, B], or [0, B] where not asked for
  at::Tensor stash;               // empty where activations are recomputed
};

// The checked inputs, dense.
struct Flow {
  Flow(const char* op, const at::Tensor& z_in, const at::Tensor& rho_in, const at::Tensor& x_in,
       const at::Tensor& step_in, const at::Tensor& alpha_in, at::TensorList parameters_in,
       std::string_view network_text, std::string_view likelihood_text, Norms norms);

  int64_t stash_numel() const {
    return flow_stash_shape(*program, likelihood, dim, z.element_size(), z.device()).total(samples, steps);
  }

  // Checked and dense.
  FlowCotangents cotangents(const std::optional<at::Tensor>& grad_z, const std::optional<at::Tensor>& grad_rho,
                            const std::optional<at::Tensor>& grad_log_px) const;
  // What the forward pass wrote, as it comes back: whoever kept it may have moved or viewed it.
  FlowPath path(const at::Tensor& z_steps, const at::Tensor& rho_steps, const at::Tensor& stash, bool store) const;

  const char* op;
  LikelihoodSpec likelihood;
  std::shared_ptr<const Program> program;
  at::TensorList parameters;
  int64_t samples = 0, dim = 0, steps = 0;
  at::Tensor z, rho;     // [B, d]
  at::Tensor x;          // [B, n]
  at::Tensor step_size;  // [K, d]
  at::Tensor alpha;      // [K]

 private:
  at::Tensor saved(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) const;
};

// For TracIn: the factors of per-sample gradients to the decoder's parameters.
struct FlowFactors {
  at::Tensor step_terms, alpha_terms;  // [K, B, d]: gradients to each sample's own step sizes; the sum over d, to alpha
  std::vector<StageFactors> stages;    // [K + 1, B, ...]
};

// Written by the backward pass; allocated where wanted, but for x, which a route allocates if wants_x. z and rho are
// always there. The parameters' gradients start at zero and are added to: two layers may share a tensor.
struct FlowResult {
  at::Tensor z, rho;  // [B, d]
  bool wants_x = false;
  at::Tensor x;          // [B, n]
  at::Tensor step_size;  // [K, d]
  at::Tensor alpha;      // [K]
  std::vector<at::Tensor> parameters;
  FlowFactors* factors = nullptr;  // where the layer-by-layer route hands out what gradients are made of
  bool wants_parameters() const;
};

void sweep_flow(const Flow& flow, const FlowPath& path);
void sweep_flow_backward(const Flow& flow, const FlowPath& path, const FlowCotangents& cotangents, FlowResult& out);

// Whether the network takes the other route: linear layers only, few and small enough for the device, independent
// outputs. It needs the stash.
bool takes_small_flow(const Program& program, const LikelihoodSpec& likelihood, int64_t dim, int64_t element_size,
                      at::Device device);
StashShape small_flow_stash(const Program& program, int64_t dim, int64_t element_size);
void run_small_flow(const Flow& flow, const FlowPath& path);
void run_small_flow_backward(const Flow& flow, const FlowPath& path, const FlowCotangents& cotangents, FlowResult& out);

}  // namespace fastvae
