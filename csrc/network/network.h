// A network bound to its tensors, and the four sweeps over it (design: every method of the package is a function on
// top of these).
//
//   forward_reverse   a_l, h_l, ll;  delta_L = r, delta_{l-1} = phi'(a_{l-1}) A_l^T delta_l;  grad_z ll
//   tangent_adjoint   H(u): the gradient of  u . grad_z ll + c ll  with respect to z and every parameter
//
// A sweep works on B samples at once and writes into a Tape: one tensor [B * numel] a stage, channel last.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "program.h"

namespace fastvae {

// What the reverse and adjoint sweeps need of the forward one. Undefined where a stage has no use for it.
struct Tape {
  std::vector<at::Tensor> h;       // phi(a), all but the last stage
  std::vector<at::Tensor> delta;   // d ll/d a, all stages
  std::vector<at::Tensor> kept_a;  // a, and
  std::vector<at::Tensor> kept_g;  // A^T delta, where keeps_input(activation)
};

// What per-sample gradients of a stage's parameters are made of, as its module saw them: [rows, features], images
// [rows, C, H, W]; with a leading dimension of steps where there are several. dA = delta (x) h without tangents, else
// delta_dot (x) h + delta (x) hdot; db = delta or delta_dot.
struct StageFactors {
  int64_t weight = -1;  // index of the parameter
  int64_t bias = -1;
  at::Tensor h, delta;
  at::Tensor hdot, delta_dot;  // undefined without tangents
};

struct TangentTape {
  std::vector<at::Tensor> hdot;       // all but the last stage
  std::vector<at::Tensor> delta_dot;  // all stages

  // The part of `count` slots from `first` on, of a tape of `slots`.
  TangentTape rows(int64_t first, int64_t count, int64_t slots) const;
};

class Network {
 public:
  Network(const char* op, const Program& program, const LikelihoodSpec& likelihood, at::TensorList tensors,
          const at::Tensor& like);

  const Program& program() const { return program_; }
  size_t depth() const { return program_.stages.size(); }
  const at::TensorOptions& options() const { return options_; }

  // Splits `storage` [steps, samples, tape_numel] (as one block a tensor, so that the steps of a stage are
  // contiguous) into the tape of steps [first, first + count).
  Tape tape(const at::Tensor& storage, int64_t steps, int64_t samples, int64_t first, int64_t count) const;
  TangentTape make_tangent_tape(int64_t rows) const;

  // x as the sweeps read it: [B, numel], channel last.
  at::Tensor observed_to_rows(const at::Tensor& x) const;
  at::Tensor observed_from_rows(const at::Tensor& x) const;

  // The tape of a forward sweep alone in `storage` [samples * forward_numel]: h, a where it is kept, and in the last
  // delta the outputs or the residual. A reverse sweep takes it with room for the rest.
  Tape forward_tape(const at::Tensor& storage, int64_t samples) const;
  Tape with_reverse_room(const Tape& tape) const;

  // The forward half of the next one: the last delta is the residual.
  void forward_residual(const at::Tensor& z, const at::Tensor& x, const Tape& tape, const at::Tensor& log_prob) const;

  // Fills the tape; writes log_prob [B] if defined; gives grad_z ll [B, d]. The gradients are those of scale * ll.
  at::Tensor forward_reverse(const at::Tensor& z, const at::Tensor& x, const Tape& tape, const at::Tensor& log_prob,
                             double scale = 1) const;

  // Its halves, for a network under another head than a likelihood. Forward fills h and gives A_L h_{L-1}, rows whose
  // bias `with_bias` adds; the last delta may hold it until the head is written there. Reverse fills the other deltas.
  at::Tensor forward(const at::Tensor& in, const Tape& tape) const;
  at::Tensor with_bias(const at::Tensor& raw) const;
  void reverse(const Tape& tape) const;

  // The forward sweep alone, log p(x | z) [B] into log_prob, through room for B samples from make_forward_room. A last
  // transposed convolution hands its outputs to the head as they come: they are never stored.
  std::vector<at::Tensor> make_forward_room(int64_t samples) const;
  void forward_log_prob(const at::Tensor& z, const at::Tensor& x, const std::vector<at::Tensor>& room,
                        const at::Tensor& log_prob) const;

  // Gives dz [B, d]; adds the gradient through grad_z ll to grad_x if defined. cotangent [B] may be undefined.
  at::Tensor tangent_adjoint(const at::Tensor& u, const at::Tensor& x, const at::Tensor& cotangent, const Tape& tape,
                             const TangentTape& out, const at::Tensor& grad_x) const;

  // Adds the parameters' part of H(u) over all rows of the tapes. gradients: aligned with the tensors, undefined where
  // not wanted.
  void accumulate_parameters(const at::Tensor& z, const at::Tensor& u, const Tape& tape, const TangentTape& tangents,
                             std::vector<at::Tensor>& gradients) const;

  // One stage at a time, for methods that walk by themselves. h = phi(A in + b), and A in + b where `kept` is defined.
  void forward_stage(size_t l, const at::Tensor& in, const at::Tensor& h, const at::Tensor& kept) const;
  // A in and A^T delta: the tensor that holds the result, `out` or a new one.
  at::Tensor apply(size_t l, const at::Tensor& in, const at::Tensor& out) const;
  at::Tensor apply_transpose(size_t l, const at::Tensor& delta, const at::Tensor& out) const;
  const at::Tensor& weight(size_t l) const { return weight_[l]; }
  // The gradients of  delta . (A h + b)  and of  delta . A hdot  with respect to the stage's parameters.
  void add_affine_gradient(size_t l, const at::Tensor& delta, const at::Tensor& h,
                           std::vector<at::Tensor>& gradients) const;
  void add_linear_gradient(size_t l, const at::Tensor& delta, const at::Tensor& hdot,
                           std::vector<at::Tensor>& gradients) const;

  // The gradients of  sum of delta . (A h + b)  over the stages with respect to the tensors of which they are wanted;
  // undefined where they are not, or no stage uses them.
  std::vector<at::Tensor> affine_gradients(const at::Tensor& in, const Tape& tape, at::TensorList tensors,
                                           at::IntArrayRef needs) const;

  // The factors at `steps` points (0: one point, without the leading dimension), of every stage with parameters.
  // Without tangents, u and theirs are undefined.
  std::vector<StageFactors> factors(const at::Tensor& z, const at::Tensor& u, const Tape& tape,
                                    const TangentTape& tangents, int64_t steps) const;

  // grad_x += cotangent * d ll/d x at the point of the tape.
  void add_observed_gradient(const at::Tensor& z, const Tape& tape, const at::Tensor& cotangent,
                             const at::Tensor& grad_x) const;

 private:
  // Residual and log probability, either of which may be undefined, of the last stage's outputs without its bias.
  void head(at::Tensor raw, const at::Tensor& x, const at::Tensor& residual, const at::Tensor& log_prob) const;
  const at::Tensor& kept_slope(size_t l, const Tape& tape) const;
  const at::Tensor& kept_error(size_t l, const Tape& tape) const;

  const Program& program_;
  LikelihoodSpec likelihood_;
  at::TensorOptions options_;
  // Gradients to the parameters of a stage with a folded norm, of the sums over rows of delta (or undefined: of the
  // linear part alone) and of the gradient to the weight that the sweeps see.
  void add_normed_gradient(size_t l, const at::Tensor& sums, const at::Tensor& of_product,
                           std::vector<at::Tensor>& gradients) const;

  std::vector<at::Tensor> weight_;  // per stage; batch norm: weight / sqrt(var + eps), the scale of a folded one, too
  std::vector<at::Tensor> bias_;    // per stage, or undefined; batch norm: bias - mean * scale
  std::vector<at::Tensor> mean_;    // batch norm: running mean (folded: less the stage's own bias), and
  std::vector<at::Tensor> rstd_;    // 1 / sqrt(var + eps)
  std::vector<at::Tensor> scale_;   // folded batch norm: of outputs, and
  std::vector<at::Tensor> plain_;   // the weight without it
};

}  // namespace fastvae
