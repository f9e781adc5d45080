// The route of hamiltonian_flow for networks whose weights fit in a core's cache, or in the shared memory of a GPU's
// blocks: one kernel for the whole trajectory.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../network/program.h"

namespace fastvae {

// Whether this network takes the route: linear layers only, few and small enough for the device, independent outputs.
bool takes_small_flow(const Program& program, const LikelihoodSpec& likelihood, int64_t dim, int64_t element_size,
                      at::Device device);

// Numbers a sample and step in the stash of this route, and what the number of samples is rounded up to.
struct StashShape {
  int64_t numel;
  int64_t multiple;
  int64_t total(int64_t samples, int64_t steps) const {
    return (steps + 1) * ((samples + multiple - 1) / multiple * multiple) * numel;
  }
};
StashShape small_flow_stash(const Program& program, int64_t dim, int64_t element_size);

struct SmallFlowTensors {
  at::Tensor z, rho, x, step_size, alpha;  // dense
  std::vector<at::Tensor> parameters;      // dense
};

void run_small_flow(const Program& program, const LikelihoodSpec& likelihood, const SmallFlowTensors& in,
                    const at::Tensor& z_steps, const at::Tensor& rho_steps, const at::Tensor& log_px,
                    const at::Tensor& log_px_steps, const at::Tensor& stash);

// Writes grad_z, grad_rho [B, d]; grad_x [B, n], step_terms [K, B, d] and alpha_terms [K, B] where defined; adds to the
// parameters' gradients where defined. The cotangents may be undefined.
void run_small_flow_backward(const Program& program, const LikelihoodSpec& likelihood, const SmallFlowTensors& in,
                             const at::Tensor& stash, const at::Tensor& cotangent_z, const at::Tensor& cotangent_rho,
                             const at::Tensor& cotangent_log_px, const at::Tensor& grad_z, const at::Tensor& grad_rho,
                             const at::Tensor& grad_x, const at::Tensor& step_terms, const at::Tensor& alpha_terms,
                             std::vector<at::Tensor>& gradients);

}  // namespace fastvae
