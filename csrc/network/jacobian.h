// The sweeps of the Jacobian penalty  sum_i sum_o |dy_o / dz_i|^p  over tiles of (sample, latent):
//
//   tangent   adot_1 = A_1 e_i;  hdot_l = phi'(a_l) adot_l;  adot_{l+1} = A_{l+1} hdot_l;  ydot = psi'(a_L) adot_L
//   adjoint   adotbar_l = phi'(a_l) A_{l+1}^T adotbar_{l+1}
//             abar_l    = phi'(a_l) A_{l+1}^T abar_{l+1} + sum_i phi''(a_l) adot_l A_{l+1}^T adotbar_{l+1}
//
// The primal, and with it phi', is shared by the latents of a sample; adot_1 by all samples. abar has one row a sample
// and is zero, and not swept, above the uppermost curved activation.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "network.h"

namespace fastvae {

// One group of latents; works on up to `samples` samples at a time.
class JacobianSweep {
 public:
  // gradients: aligned with the network's tensors, undefined where not wanted, added to. grad_z: whether dz is wanted.
  // Without either only the terms are computed.
  JacobianSweep(const Network& network, at::IntArrayRef latents, bool squared, int64_t samples,
                std::vector<at::Tensor>& gradients, bool grad_z);

  // Adds to terms [count] those of z [count, d], and to the gradients those of  sum_b weight_b terms_b  (weight
  // [count], undefined: 1). grad_z [count, d] may be undefined.
  void run(const at::Tensor& z, const at::Tensor& weight, const at::Tensor& terms, const at::Tensor& grad_z);

  // Adds what is summed over all samples first. To be called once, at the end.
  void finish();

  // Numbers of workspace: for each latent of a sample, and for a sample besides.
  static int64_t numel_per_latent(const Program& program);
  static int64_t numel_per_sample(const Program& program);

 private:
  const Stage& stage(size_t l) const { return network_.program().stages[l]; }
  bool curved(size_t l) const { return !is_piecewise_linear(stage(l).activation.kind); }
  bool with_gradient() const { return lowest_ < depth_; }
  size_t find_lowest(bool grad_z) const;
  // What slopes are read from (s of kernels.h); undefined under the identity.
  at::Tensor kept(size_t l) const;
  // The part of a buffer that belongs to the tile at hand.
  at::Tensor of_samples(const at::Tensor& buffer, int64_t numel) const { return buffer.narrow(0, 0, count_ * numel); }
  at::Tensor of_rows(const at::Tensor& buffer, int64_t numel) const {
    return buffer.narrow(0, 0, count_ * latents_ * numel);
  }

  void forward(const at::Tensor& z) const;
  void tangents();
  // Both give A_L^T adotbar_L, undefined where the adjoint sweep ends above.
  at::Tensor head(const at::Tensor& weight, const at::Tensor& terms, const at::Tensor& abar);
  at::Tensor head_by_columns(const at::Tensor& weight, const at::Tensor& terms, const at::Tensor& abar);
  void launch_head(const at::Tensor& adot, int64_t first, const at::Tensor& weight, const at::Tensor& terms,
                   const at::Tensor& abar) const;
  at::Tensor bend(size_t l, const at::Tensor& hdotbar, const at::Tensor& hbar) const;
  void add_gradients(size_t l, const at::Tensor& adotbar, const at::Tensor& abar, const at::Tensor& z);
  at::Tensor transpose(size_t l, const at::Tensor& adotbar) const;

  const Network& network_;
  std::vector<at::Tensor>& gradients_;
  bool squared_;
  int64_t latents_;
  int64_t count_ = 0;     // samples of the tile at hand
  size_t depth_;          // stages, but for an identity at the end
  size_t lowest_;         // the stage where the adjoint sweep may end; depth_ without a gradient
  int64_t columns_;       // of a last Linear layer that are worked on at a time
  at::Tensor seeds_;      // e_i [latents, d]
  at::Tensor first_;      // A_1 e_i [latents, n_1]
  at::Tensor first_bar_;  // adotbar_1 summed over all samples, [latents, n_1]
  // By stage: of the samples h and, where keeps_input, a; of the rows hdot and, where keeps_input, adot.
  std::vector<at::Tensor> h_, a_, hdot_, adot_;
  at::Tensor bars_[2];  // of the rows, taken in turn by the stages of the adjoint sweep
};

}  // namespace fastvae
