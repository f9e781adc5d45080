// The structure of a feed-forward network, without its tensors: what `fastvae.lowering.lower` writes as text, parsed
// and checked against the tensors' shapes.
//
//   linear W B | conv2d W B sh sw ph pw dh dw groups | conv_transpose2d W B sh sw ph pw oph opw dh dw groups
//   batch_norm W B M V eps | reshape d...
//   relu | leaky_relu slope | elu alpha | softplus beta threshold | tanh | sigmoid | silu | gelu | gelu_tanh
//
// joined by ";". W, B, M, V index the tensor list (-1: none). A stage is one affine map and one activation:
//
//   a_l = A_l h_{l-1} + b_l,   h_l = phi_l(a_l)
//
// A batch norm is a stage of its own or, folded, part of the linear map or convolution in front of it.
//
// All stages store their samples channel last, [sample, position, channel]; "permute" stages convert where a flat
// vector (channel major, as torch flattens) becomes an image or the reverse.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "../kernels/math/activations.h"
#include "../kernels/math/likelihoods.h"

namespace fastvae {

// Numbers that all layers of a network give for a sample, at most: what is computed from sizes then fits 64 bits.
constexpr int64_t kMostNumel = int64_t{1} << 40;

struct SampleShape {
  int64_t channels = 0;
  int64_t height = 1;
  int64_t width = 1;
  bool flat = true;
  int64_t positions() const { return height * width; }
  int64_t numel() const { return channels * positions(); }
};

enum class Affine : int { kIdentity, kLinear, kConv2d, kConvTranspose2d, kBatchNorm, kToImage, kToFlat };

// What becomes of batch norms behind a linear map or convolution. Folded, there is neither a pass for them nor room for
// what they read; per-sample gradients and copies of a network need them apart.
enum class Norms : int { kApart, kFolded };

struct Stage {
  Affine affine = Affine::kIdentity;
  int64_t weight = -1;
  int64_t bias = -1;
  bool normed = false;  // a batch norm is folded into it, of these parameters, of its running_mean and so on
  int64_t norm_weight = -1;
  int64_t norm_bias = -1;
  int64_t running_mean = -1;
  int64_t running_var = -1;
  double eps = 0.0;
  std::vector<int64_t> kernel, stride, padding, output_padding, dilation;
  int64_t groups = 1;
  ActivationSpec activation;
  SampleShape in;
  SampleShape out;
  // Of a linear map's or a convolution's weight.
  int64_t weight_numel() const {
    int64_t numel = in.channels / groups * out.channels;
    for (const int64_t size : kernel) {
      numel *= size;
    }
    return numel;
  }
};

using TensorShapes = std::vector<std::vector<int64_t>>;

// ValueError, naming the layer, for a text or tensors that make no network: nothing that a stage says is out of range,
// and no stage is empty.
struct Program {
  Program(const char* op, std::string_view text, const TensorShapes& shapes, int64_t in_features,
          const LikelihoodSpec& likelihood, Norms norms);

  std::vector<Stage> stages;
  int64_t in_features() const { return stages.front().in.numel(); }
  const SampleShape& output() const { return stages.back().out; }
  // Numbers a sample that the backward sweeps need of one forward and reverse sweep.
  int64_t tape_numel() const;
  // Of them those that the forward sweep writes.
  int64_t forward_numel() const;
};

// The program of a network's text and tensors; the same object as long as they do not change, because reading the text
// costs as much as some kernels.
std::shared_ptr<const Program> find_program(const char* op, std::string_view text, at::TensorList tensors,
                                            int64_t in_features, const LikelihoodSpec& likelihood, Norms norms);

// That of a posterior's encoder, from so many elements of x to the mean and log variance [2 latent_dim] of so many
// samples. It has no likelihood: of encoder_head() only the shape is asked.
LikelihoodSpec encoder_head();
std::shared_ptr<const Program> find_encoder(const char* op, std::string_view text, at::TensorList tensors,
                                            int64_t elements, int64_t latent_dim, int64_t samples, Norms norms);

LikelihoodSpec parse_likelihood(const char* op, std::string_view text);

TensorShapes shapes_of(at::TensorList tensors);

// The d of z [B, d], which it checks.
int64_t checked_dim(const char* op, const at::Tensor& z);

// Raises where the activations of so many samples, at so many points of a path each, are too many to be counted.
void check_room(const char* op, const char* argument, const Program& program, int64_t samples, int64_t points = 1);

// Checks the output of the network against the likelihood and gives the number of elements of x a sample.
int64_t observed_numel(const char* op, const Program& program, const LikelihoodSpec& likelihood);

}  // namespace fastvae
