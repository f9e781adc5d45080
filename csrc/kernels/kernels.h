// The line between glue and kernels: plain pointers, sizes, and a range (CPU) or a stream (CUDA). No tensor type
// crosses it, so kernels compile and test without torch.
//
// Each kernel is one argument struct and two functions of the same name. The CPU one does the part [begin, end) of
// its index (named at the struct) on the calling thread; the glue splits it. The CUDA one launches all of it.
// All arrays are dense. Tensors of a network are stored [sample, position, channel], channel last.
#pragma once

#include <cstdint>

#include "convolution.h"
#include "copied_convolution.h"
#include "copies.h"
#include "keyed_noise.h"
#include "math/activations.h"
#include "math/element_heads.h"
#include "math/likelihoods.h"
#include "norm_activation.h"
#include "small_network.h"

namespace fastvae {

using Stream = void*;  // a cudaStream_t; opaque here so that no CUDA header is needed

// h = phi(a + bias). Index: rows.
template <typename T>
struct BiasActivation {
  const T* a;
  const T* bias;  // [channels] or null
  T* h;           // may be a
  T* kept;        // a + bias, or null
  int64_t rows;
  int64_t channels;
  ActivationSpec activation;
};

// delta = phi'(s) * g. Index: elements.
template <typename T>
struct ActivationReverse {
  const T* g;
  const T* s;
  T* delta;  // may be g
  int64_t size;
  ActivationSpec activation;
};

// hdot = phi'(s) * adot;  curvature = phi''(.) * adot * A^T delta (see activations.h for s and e). Index: elements.
template <typename T>
struct ActivationTangent {
  const T* adot;
  const T* s;
  const T* e;
  T* hdot;       // may be adot
  T* curvature;  // null where phi is piecewise linear
  int64_t size;
  ActivationSpec activation;
};

// delta_dot = phi'(s) * g + curvature. Index: elements.
template <typename T>
struct ActivationAdjoint {
  const T* g;
  const T* s;
  const T* curvature;  // may be delta_dot; null where phi is piecewise linear
  T* delta_dot;
  int64_t size;
  ActivationSpec activation;
};

// residual = d ll/d a and, where wanted, log_prob = sum of ll over a sample, for a + bias. Index: samples.
template <typename T>
struct HeadResidual {
  const T* a;
  const T* bias;  // [channels] or null
  const T* x;
  T* residual;  // may be a; null if only the log probability is wanted
  T* log_prob;  // [samples] or null
  int64_t samples;
  int64_t positions;
  int64_t channels;  // of a; x has channels / classes of them under a categorical likelihood
  LikelihoodSpec likelihood;
  T* partial = nullptr;  // CUDA: room for [samples, head_chunks]; null where there is one chunk or no log_prob
};

// The parts of a sample that a GPU's blocks take, whatever the number of samples: of 64 observed numbers with a choice
// of classes, or of 4,096 others.
inline int64_t head_chunks(const LikelihoodSpec& likelihood, int64_t positions, int64_t channels) {
  const bool chosen = likelihood.kind == Likelihood::kCategorical;
  const int64_t numbers = positions * (chosen ? channels / likelihood.classes : channels), most = chosen ? 64 : 4096;
  return (numbers + most - 1) / most;
}

// delta_dot = S adot + cotangent * residual;  grad_x += (d r/d x) adot. Index: samples.
template <typename T>
struct HeadTangent {
  const T* adot;
  const T* residual;
  const T* x;
  const T* cotangent;  // [samples] or null
  T* delta_dot;        // may be adot
  T* grad_x;           // or null; never with a categorical likelihood
  int64_t samples;
  int64_t positions;
  int64_t channels;
  LikelihoodSpec likelihood;
};

// Likelihoods of element_heads.h, of whose elements each has its outputs in y [samples, outputs, size]: residual = w r
// and, where wanted, log_prob = sum of w ll over a sample; an element of weight 0 counts as 0, whatever it is. Index:
// samples.
template <typename T>
struct ElementHeadResidual {
  const T* y;
  const T* x;       // [samples, size]
  const T* weight;  // the same, or null for 1
  T* residual;      // as y; null if only the log probability is wanted
  T* log_prob;      // [samples] or null
  int64_t samples;
  int64_t size;
  ElementHeadSpec likelihood;
  T* partial = nullptr;  // CUDA: as in HeadResidual
};

// delta_dot = w S dot + cotangent * residual. Index: samples.
template <typename T>
struct ElementHeadTangent {
  const T* y;
  const T* x;
  const T* weight;     // or null
  const T* dot;        // as y
  const T* residual;   // as y; null without a cotangent
  const T* cotangent;  // [samples] or null
  T* delta_dot;
  int64_t samples;
  int64_t size;
  ElementHeadSpec likelihood;
};

// As head_chunks.
inline int64_t element_head_chunks(int64_t size) { return (size + 4095) / 4096; }

// The first half of a leapfrog step; arrays are [samples, dim]. Index: samples.
template <typename T>
struct KickDrift {
  const T* z;
  const T* rho;
  const T* force;
  const T* step;  // [dim], or one number with step_stride 0
  int64_t step_stride;
  T* z_next;
  T* rho_half;
  int64_t samples;
  int64_t dim;
};

// The second half. Index: samples. With z, `force` holds grad_z ll and the force of a standard normal prior is added: F
// = force - z.
template <typename T>
struct KickTemper {
  const T* rho_half;
  const T* force;
  const T* z;  // or null
  const T* step;
  int64_t step_stride;
  const T* alpha;  // one number
  T* rho_next;
  T* force_out;  // F, or null
  int64_t samples;
  int64_t dim;
};

// Gradient of KickTemper. The terms are summed by the glue (over their rows, and for alpha over dim). On a CPU a row
// can hold the sum of `share` samples, which saves writing and reading an array. Index: rows.
template <typename T>
struct KickTemperBackward {
  const T* grad;
  const T* rho_half;  // null where alpha_terms is
  const T* force;     // F(z')
  const T* step;
  int64_t step_stride;
  const T* alpha;
  const T* pending;  // what the next step left for F(z'), or null
  T* grad_momentum;  // of rho~ + eps/2 F(z')
  T* grad_force;     // pending included; may be pending
  T* alpha_terms;    // [rows, dim] or null
  T* step_terms;     // [rows, dim] or null
  int64_t samples;
  int64_t dim;
  int64_t share = 1;  // samples of a row, the last one's as many as are left; CUDA: 1
};

// Gradient of KickDrift. Rows of terms and index as above. In a flow, grad_z first receives the cotangent of F(z')
// through the network and the prior, grad_z += hessian - through_force, and the terms of alpha wait until rho~ is
// known: alpha_terms = grad_rho_next (rho~ + eps/2 force_next).
template <typename T>
struct KickDriftBackward {
  const T* grad_z;
  const T* grad_rho_half;
  const T* hessian;        // or null
  const T* through_force;  // null where hessian is
  const T* rho;
  const T* force;
  const T* grad_rho_next;  // null where alpha_terms is
  const T* force_next;     // null where alpha_terms is
  const T* step;
  int64_t step_stride;
  T* grad_z_out;  // may be grad_z
  T* grad_rho;    // may be grad_rho_half or grad_rho_next
  T* grad_force;
  T* step_terms;         // or null
  T* alpha_terms;        // or null
  bool accumulate_step;  // add to step_terms, which KickTemperBackward of the same step has written
  int64_t samples;
  int64_t dim;
  int64_t share = 1;
};

// kl = KL(N(mu_q, e^logvar_q) || N(mu_p, e^logvar_p)) with diagonal covariances; arrays are [samples, dim]. Index:
// samples.
template <typename T>
struct GaussianKl {
  const T* mu_q;
  const T* logvar_q;
  const T* mu_p;      // null: p is standard normal
  const T* logvar_p;  // null where mu_p is
  T* kl;              // [samples]
  int64_t samples;
  int64_t dim;
};

// Gradient of GaussianKl. Index: samples.
template <typename T>
struct GaussianKlBackward {
  const T* grad;  // [samples]
  const T* mu_q;
  const T* logvar_q;
  const T* mu_p;      // null: p is standard normal
  const T* logvar_p;  // null where mu_p is
  T* grad_mu_q;
  T* grad_logvar_q;
  T* grad_mu_p;      // null where mu_p is
  T* grad_logvar_p;  // null where mu_p is
  int64_t samples;
  int64_t dim;
};

// The Jacobian sweeps: `latents` tangents of each sample share that sample's activations. In the three of them s is
// what the activation keeps (activations.h), [samples, numel], and e is its partner in the second derivative: hdot,
// or adot where keeps_input(activation).

// hdot = phi'(s) * adot for every latent. Index: samples.
template <typename T>
struct JacobianTangent {
  const T* adot;  // [samples, latents, numel], or [latents, numel] if shared
  const T* s;     // null under the identity
  T* hdot;        // [samples, latents, numel]; may be adot unless that is shared
  bool shared;    // adot is the same for all samples
  int64_t samples;
  int64_t latents;
  int64_t numel;
  ActivationSpec activation;
};

// The end of the tangents and the start of the adjoint sweep, y = psi(a): for ydot = psi'(s) * adot,
//
//   terms = sum |ydot|^p;   adotbar = psi'(s) * w;   abar = sum over latents of psi''(.) * adot * w,
//
// w = weight * d|ydot|^p / d ydot, over the columns [first, first + numel) of y. Index: samples * chunks.
template <typename T>
struct JacobianHead {
  const T* adot;    // [samples, latents, numel]
  const T* s;       // [samples, outputs]; null under the identity
  const T* weight;  // [samples] or null (1)
  T* terms;         // [samples, chunks]
  T* adotbar;       // [samples, latents, numel], may be adot; null if only the terms are wanted
  T* abar;          // [samples, outputs]; null where adotbar is, or psi is piecewise linear
  bool squared;     // p = 2 instead of 1
  int64_t samples;
  int64_t latents;
  int64_t numel;
  int64_t outputs;
  int64_t first;
  ActivationSpec activation;
};

constexpr int64_t kJacobianChunk = 1024;  // columns whose terms are summed in one go
constexpr int64_t jacobian_chunks(int64_t numel) { return (numel + kJacobianChunk - 1) / kJacobianChunk; }

// adotbar = phi'(s) * hdotbar;   abar = phi'(s) * hbar + sum over latents of phi''(.) * adot * hdotbar.
// Index: samples.
template <typename T>
struct JacobianAdjoint {
  const T* hdotbar;  // [samples, latents, numel]
  const T* s;        // null under the identity
  const T* e;        // [samples, latents, numel], or [latents, numel] if shared; null where phi is piecewise linear
  const T* hbar;     // [samples, numel], or null (zero)
  T* adotbar;        // may be hdotbar
  T* abar;           // may be hbar; null where it would be zero
  bool shared;       // e is the same for all samples
  int64_t samples;
  int64_t latents;
  int64_t numel;
  ActivationSpec activation;
};

// Dot products of per-sample gradients from factors, the Gram matrices given: for samples i and j of a tile,
//   out[i, j] (+)= sum_{t,t'} (of_inputs[i t, j t'] + bias) of_grads[i t, j t']
// Index: samples of a.
template <typename T>
struct GramProduct {
  const T* of_inputs;  // [samples_a terms_a, samples_b terms_b]
  const T* of_grads;   // the same
  T* out;              // [samples_a, samples_b], rows out_stride apart
  int64_t out_stride;
  int64_t samples_a;
  int64_t terms_a;
  int64_t samples_b;
  int64_t terms_b;
  bool bias;
  bool accumulate;  // add to out
};

#define FASTVAE_FOR_EACH_KERNEL(DECLARE)              \
  DECLARE(unfold, Unfold)                             \
  DECLARE(fold, Fold)                                 \
  DECLARE(bias_activation, BiasActivation)            \
  DECLARE(activation_reverse, ActivationReverse)      \
  DECLARE(activation_tangent, ActivationTangent)      \
  DECLARE(activation_adjoint, ActivationAdjoint)      \
  DECLARE(head_residual, HeadResidual)                \
  DECLARE(head_tangent, HeadTangent)                  \
  DECLARE(element_head_residual, ElementHeadResidual) \
  DECLARE(element_head_tangent, ElementHeadTangent)   \
  DECLARE(kick_drift, KickDrift)                      \
  DECLARE(kick_temper, KickTemper)                    \
  DECLARE(kick_temper_backward, KickTemperBackward)   \
  DECLARE(kick_drift_backward, KickDriftBackward)     \
  DECLARE(gaussian_kl, GaussianKl)                    \
  DECLARE(gaussian_kl_backward, GaussianKlBackward)   \
  DECLARE(small_flow, SmallFlow)                      \
  DECLARE(small_flow_backward, SmallFlowBackward)     \
  DECLARE(jacobian_tangent, JacobianTangent)          \
  DECLARE(jacobian_head, JacobianHead)                \
  DECLARE(jacobian_adjoint, JacobianAdjoint)          \
  DECLARE(gram_product, GramProduct)

namespace cpu {
#define FASTVAE_DECLARE_CPU(NAME, ARGS)                           \
  void NAME(const ARGS<float>& args, int64_t begin, int64_t end); \
  void NAME(const ARGS<double>& args, int64_t begin, int64_t end);
FASTVAE_FOR_EACH_KERNEL(FASTVAE_DECLARE_CPU)
FASTVAE_FOR_EACH_COPIES_KERNEL(FASTVAE_DECLARE_CPU)
FASTVAE_DECLARE_CPU(narrow_conv_transpose, NarrowConvTranspose)
FASTVAE_DECLARE_CPU(direct_conv_transpose, DirectConvTranspose)
FASTVAE_DECLARE_CPU(conv_transpose_log_prob, ConvTransposeLogProb)
FASTVAE_DECLARE_CPU(direct_conv_transpose_reverse, DirectConvTransposeReverse)
FASTVAE_DECLARE_CPU(direct_conv_transpose_gradient, DirectConvTransposeGradient)
FASTVAE_DECLARE_CPU(adam_outer, AdamOuter)
FASTVAE_DECLARE_CPU(copied_convolution_small, CopiedConvolution)
FASTVAE_DECLARE_CPU(copied_convolution_big, CopiedConvolution)
FASTVAE_DECLARE_CPU(copied_convolution_weight, CopiedConvolution)
FASTVAE_DECLARE_CPU(norm_activation_forward, NormActivation)
FASTVAE_DECLARE_CPU(norm_activation_reverse, NormActivation)
FASTVAE_DECLARE_CPU(norm_activation_tangent, NormActivation)
FASTVAE_DECLARE_CPU(norm_activation_adjoint, NormActivation)
#undef FASTVAE_DECLARE_CPU
void sample_keys(const SampleKeys& args, int64_t begin, int64_t end);
void keyed_numbers(const KeyedNumbers& args, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
#define FASTVAE_DECLARE_CUDA(NAME, ARGS)             \
  void NAME(const ARGS<float>& args, Stream stream); \
  void NAME(const ARGS<double>& args, Stream stream);
FASTVAE_FOR_EACH_KERNEL(FASTVAE_DECLARE_CUDA)
FASTVAE_FOR_EACH_COPIES_KERNEL(FASTVAE_DECLARE_CUDA)
FASTVAE_DECLARE_CUDA(small_flow_sum, SmallFlowSum)
#undef FASTVAE_DECLARE_CUDA
void sample_keys(const SampleKeys& args, Stream stream);
void keyed_numbers(const KeyedNumbers& args, Stream stream);

// Whether small_flow and small_flow_backward find room for this network in the shared memory of the device's blocks.
bool small_flow_fits(const SmallNetwork<float>& network, int64_t dim, int device);
bool small_flow_fits(const SmallNetwork<double>& network, int64_t dim, int device);
}  // namespace cuda

// A kernel that stands in no list here but has a header of its own, and a test (tests/cpp/test_NAME.cpp).
#define FASTVAE_DECLARE_KERNEL(NAME, ARGS)                         \
  namespace cpu {                                                  \
  void NAME(const ARGS<float>& args, int64_t begin, int64_t end);  \
  void NAME(const ARGS<double>& args, int64_t begin, int64_t end); \
  }                                                                \
  namespace cuda {                                                 \
  void NAME(const ARGS<float>& args, Stream stream);               \
  void NAME(const ARGS<double>& args, Stream stream);              \
  }

}  // namespace fastvae
