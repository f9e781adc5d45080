// A network of which every sample of a batch owns a copy, and trains it by Adam (likelihood regret).
//
//   forward   a_l = A_l h_{l-1} + b_l, h_l = phi_l(a_l), each sample with its own A_l, b_l
//   update    delta_l down to the first layer with parameters, and a step for each of them on the way
//
// The input stays, so that what leads to the first layer with parameters is evaluated once, and a convolution there is
// unfolded once. Dense layers store no gradient (kernels/copies.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "../kernels/kernels.h"
#include "program.h"

namespace fastvae {

struct AdamSettings {
  double lr, beta1, beta2, eps, decay;
};

class NetworkCopies {
 public:
  // x [B, n]; parameters: the tensors of the network, of which every sample gets its copy; at most `steps` updates.
  NetworkCopies(const std::string& network, const std::vector<at::Tensor>& parameters, const at::Tensor& x,
                const AdamSettings& settings, int64_t steps);

  // [B, outputs]
  at::Tensor forward();
  // A step, given the gradient [B, outputs] to what forward gave since the last one.
  void update(const at::Tensor& grad);
  // Of all samples, [B, ...] each, aligned with the constructor's; undefined where it is no parameter.
  std::vector<at::Tensor> parameters();

 private:
  // A tensor of all samples with its moments.
  struct Trained {
    at::Tensor value, mean, square;
    at::Tensor grad;  // where it is stored
  };
  struct Layer {
    bool dense = false;     // a Linear, or a convolution with one position
    Trained weight;         // dense: [B, in + bias, out]; convolution: [B, kh kw C, out]; norm: [2, B, C]
    Trained bias;           // convolution: [B, 1, out]
    at::Tensor seen;        // dense: [B, in + bias] int32
    at::Tensor mean, rstd;  // norm
    at::Tensor columns;     // convolution: [B, positions, kh kw C] of its input, and
    at::Tensor grad_columns;
    ConvolutionWindow window{};
    at::Tensor a, h, delta;  // flat, channel last; h may be a
    at::Tensor grad_in;      // where the gradient goes on
    bool flat_at_zero = false;
  };

  const Stage& stage(size_t l) const { return program_->stages[l]; }
  size_t depth() const { return program_->stages.size(); }
  const at::Tensor& input(size_t l) const { return l == first_ ? input_ : layers_[l - 1].h; }

  void prepare(size_t l, const std::vector<at::Tensor>& parameters, const at::TensorOptions& options);
  void unfold(size_t l);
  at::Tensor partial_sums(const Stage& stage) const;
  at::Tensor affine(size_t l);
  void activate(size_t l, const at::Tensor& a);
  at::Tensor affine_reverse(size_t l, const at::Tensor& delta);
  at::Tensor convolution_reverse(size_t l, const at::Tensor& delta);
  void step(const Trained& trained) const;
  math::AdamRate<double> rate(int64_t step) const;
  template <typename T>
  math::Adam<T> adam() const;
  template <typename T>
  CopiedRows<T> rows(const Layer& layer, const Stage& stage) const;

  AdamSettings settings_;
  int64_t max_steps_;
  int64_t steps_ = 0;  // that the host asked for; replayed from a CUDA graph, they are more
  int64_t samples_ = 0;
  size_t tensors_;
  std::shared_ptr<const Program> program_;
  std::vector<Layer> layers_;
  size_t first_ = 0;            // layer with parameters
  at::Tensor input_;            // of that layer, flat, channel last
  at::Tensor rates_;            // [steps, 2]
  at::Tensor taken_;            // [1] int32
  bool product_ready_ = false;  // the last update left the first layer's product behind
  bool evaluated_ = false;      // forward has run since the last update
};

}  // namespace fastvae
