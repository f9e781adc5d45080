#include "program.h"

#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "../common/check.h"
#include "activation_words.h"
#include "geometry.h"
#include "words.h"

namespace fastvae {
namespace {

class Parser {
 public:
  Parser(const char* op, const TensorShapes& shapes, int64_t in_features, Norms norms)
      : op_(op), shapes_(shapes), norms_(norms) {
    FASTVAE_CHECK_VALUE(in_features > 0 && in_features <= kMostNumel, op, "network",
                        c10::str("an input of 1 to ", kMostNumel, " features"), in_features);
    shape_.channels = in_features;
  }

  std::vector<Stage> run(std::string_view text, bool exact_output) {
    for (const std::string& line : split(text, ';')) {
      layer(line);
    }
    // The last stage feeds the likelihood head, which takes a_L: an activation there needs a stage after it.
    // A last reshape that moves nothing matters only to a head that reads channels.
    if (stages_.empty() || stages_.back().activation.kind != Activation::kIdentity ||
        (exact_output && stages_.back().out.channels != shape_.channels)) {
      begin(Affine::kIdentity);
    }
    return std::move(stages_);
  }

  void expect(bool condition, const std::string& what) const {
    TORCH_CHECK_VALUE(condition, "fastvae::", op_, ": network: layer '", line_, "' with an input of [", shape_.channels,
                      ", ", shape_.height, ", ", shape_.width, "] a sample: ", what);
  }

  void expect_numbers(size_t count) const {
    expect(words_.size() == count + 1, c10::str("expected ", count, " numbers, got ", words_.size() - 1));
  }

  double number(size_t index) const { return to_number(op_, "network", words_[index]); }

 private:
  void layer(const std::string& line) {
    line_ = line;
    words_ = split(line, ' ');
    FASTVAE_CHECK_VALUE(!words_.empty(), op_, "network", "a layer", "'" + line + "'");
    const std::string& kind = words_[0];
    if (kind == "linear") {
      linear();
    } else if (kind == "conv2d") {
      conv2d();
    } else if (kind == "conv_transpose2d") {
      conv_transpose2d();
    } else if (kind == "batch_norm") {
      batch_norm();
    } else if (kind == "reshape") {
      reshape();
    } else {
      activation(kind);
    }
  }

  int64_t integer(size_t index) const { return to_integer(op_, "network", words_[index]); }

  std::vector<int64_t> pair(size_t index) const { return {integer(index), integer(index + 1)}; }

  // The product of two sizes of at least 1, as a size that fits.
  int64_t times(int64_t a, int64_t b) const {
    uint64_t product = 0;
    const bool over = c10::mul_overflows(static_cast<uint64_t>(a), static_cast<uint64_t>(b), &product);
    expect(a > 0 && b > 0, "a size is less than 1");
    expect(!over && product <= kMostNumel, c10::str("a size is larger than ", kMostNumel));
    return static_cast<int64_t>(product);
  }

  const std::vector<int64_t>& sizes(int64_t index, size_t dims) const {
    expect(index >= 0 && index < static_cast<int64_t>(shapes_.size()), "tensor index out of range");
    expect(shapes_[index].size() == dims,
           c10::str("expected a tensor of ", dims, " dimensions, got ", at::IntArrayRef(shapes_[index])));
    return shapes_[index];
  }

  void check_vector(int64_t index, int64_t length) const {
    if (index != -1) {
      const std::vector<int64_t>& size = sizes(index, 1);
      expect(size[0] == length, c10::str("expected a vector of ", length, ", got ", at::IntArrayRef(size)));
    }
  }

  Stage& begin(Affine affine) {
    Stage stage;
    stage.affine = affine;
    stage.in = shape_;
    stage.out = shape_;
    stages_.push_back(std::move(stage));
    return stages_.back();
  }

  void end(const SampleShape& out) {
    times(times(out.channels, out.height), out.width);
    stages_.back().out = out;
    shape_ = out;
  }

  // Height and width of a convolution's output, by either way of ConvolutionAxis.
  SampleShape convolved(const Stage& stage, int64_t channels, int64_t (ConvolutionAxis::*size)(int64_t) const) const {
    const auto along = [&](int64_t in, size_t axis) {
      const ConvolutionAxis numbers{stage.kernel[axis], stage.stride[axis], stage.padding[axis],
                                    stage.output_padding[axis], stage.dilation[axis]};
      const std::string fault = numbers.fault();
      expect(fault.empty(), fault);
      const int64_t out = (numbers.*size)(in);
      expect(out > 0, "the output is empty: the kernel does not fit into the padded input");
      return out;
    };
    return {channels, along(shape_.height, 0), along(shape_.width, 1), false};
  }

  void expect_groups(int64_t groups, int64_t channels, const char* side) const {
    expect(groups > 0 && channels % groups == 0,
           c10::str("expected groups that divide the ", channels, " ", side, " channels, got ", groups));
  }

  void linear() {
    expect_numbers(2);
    const std::vector<int64_t>& weight = sizes(integer(1), 2);
    expect(shape_.flat, "expected a flat input, [B, features]");
    expect(weight[1] == shape_.channels, c10::str("expected ", weight[1], " features"));
    times(weight[0], weight[1]);
    Stage& stage = begin(Affine::kLinear);
    stage.weight = integer(1);
    stage.bias = integer(2);
    check_vector(stage.bias, weight[0]);
    end({weight[0], 1, 1, true});
  }

  void conv2d() {
    expect_numbers(9);
    const std::vector<int64_t>& weight = sizes(integer(1), 4);
    expect(!shape_.flat, "expected an image, [B, C, H, W]");
    Stage& stage = begin(Affine::kConv2d);
    stage.weight = integer(1);
    stage.bias = integer(2);
    stage.kernel = {weight[2], weight[3]};
    stage.stride = pair(3);
    stage.padding = pair(5);
    stage.output_padding = {0, 0};
    stage.dilation = pair(7);
    stage.groups = integer(9);
    expect_groups(stage.groups, weight[0], "output");
    const int64_t channels = times(weight[1], stage.groups);
    expect(channels == shape_.channels, c10::str("expected ", channels, " channels"));
    check_vector(stage.bias, weight[0]);
    end(convolved(stage, weight[0], &ConvolutionAxis::convolved));
  }

  void conv_transpose2d() {
    expect_numbers(11);
    const std::vector<int64_t>& weight = sizes(integer(1), 4);
    expect(!shape_.flat, "expected an image, [B, C, H, W]");
    Stage& stage = begin(Affine::kConvTranspose2d);
    stage.weight = integer(1);
    stage.bias = integer(2);
    stage.kernel = {weight[2], weight[3]};
    stage.stride = pair(3);
    stage.padding = pair(5);
    stage.output_padding = pair(7);
    stage.dilation = pair(9);
    stage.groups = integer(11);
    expect(weight[0] == shape_.channels, c10::str("expected ", weight[0], " channels"));
    expect_groups(stage.groups, weight[0], "input");
    const int64_t channels = times(weight[1], stage.groups);
    check_vector(stage.bias, channels);
    end(convolved(stage, channels, &ConvolutionAxis::transposed));
  }

  // Whether a batch norm is a scale of the last stage's outputs, of so many that folding pays: it passes a dozen times
  // over the weight a call, the norm six times over the outputs of each sample and force, say of 16 samples and 4.
  bool can_fold() const {
    constexpr int64_t kOutputs = 32;
    if (norms_ == Norms::kApart || stages_.empty()) {
      return false;
    }
    const Stage& stage = stages_.back();
    const bool is_product = stage.affine == Affine::kLinear || stage.affine == Affine::kConv2d ||
                            (stage.affine == Affine::kConvTranspose2d && stage.groups == 1);
    return is_product && !stage.normed && stage.activation.kind == Activation::kIdentity &&
           stage.out.channels == shape_.channels && stage.weight_numel() <= kOutputs * stage.out.numel();
  }

  void batch_norm() {
    expect_numbers(5);
    const bool folds = can_fold();
    Stage& stage = folds ? stages_.back() : begin(Affine::kBatchNorm);
    (folds ? stage.norm_weight : stage.weight) = integer(1);
    (folds ? stage.norm_bias : stage.bias) = integer(2);
    stage.normed = folds;
    stage.running_mean = integer(3);
    stage.running_var = integer(4);
    stage.eps = number(5);
    expect(!(stage.eps < 0.0), "expected eps of at least 0");
    sizes(stage.running_mean, 1);
    sizes(stage.running_var, 1);
    for (const int64_t index : {integer(1), integer(2), stage.running_mean, stage.running_var}) {
      check_vector(index, shape_.channels);
    }
  }

  void reshape() {
    expect(words_.size() >= 2 && words_.size() <= 4, "expected one to three dimensions a sample");
    std::vector<int64_t> target;
    int64_t known = 1;
    std::optional<size_t> free;
    for (size_t i = 1; i < words_.size(); ++i) {
      target.push_back(integer(i));
      if (target.back() == -1 && !free) {
        free = i - 1;
      } else {
        known = times(known, target.back());
      }
    }
    if (free) {
      target[*free] = shape_.numel() / known;
      known *= target[*free];
    }
    expect(known == shape_.numel(), c10::str("cannot become ", at::IntArrayRef(target)));
    if (target.size() == 2) {
      target.insert(target.begin() + 1, 1);  // channels and one row of positions, as torch reads [B, C, L]
    }
    const bool moves_out = !shape_.flat && shape_.channels > 1 && shape_.positions() > 1;
    const bool same_image = target.size() == 3 && !shape_.flat && shape_.channels == target[0] &&
                            shape_.height == target[1] && shape_.width == target[2];
    if (same_image) {
      return;
    }
    become(moves_out ? Affine::kToFlat : Affine::kIdentity, {shape_.numel(), 1, 1, true});
    if (target.size() == 3) {
      const bool moves_in = target[0] > 1 && target[1] * target[2] > 1;
      become(moves_in ? Affine::kToImage : Affine::kIdentity, {target[0], target[1], target[2], false});
    }
  }

  // A reshape that moves nothing needs no stage: the next one reads the same memory under its own shape.
  void become(Affine affine, const SampleShape& shape) {
    if (affine == Affine::kIdentity) {
      shape_ = shape;
    } else {
      begin(affine);
      end(shape);
    }
  }

  void activation(const std::string& kind) {
    const ActivationSpec spec = activation_of(kind, *this);
    expect(spec.kind != Activation::kIdentity, "unknown kind of layer");
    if (stages_.empty() || stages_.back().activation.kind != Activation::kIdentity) {
      begin(Affine::kIdentity);
    }
    stages_.back().activation = spec;
  }

  const char* op_;
  const TensorShapes& shapes_;
  Norms norms_;
  SampleShape shape_;
  std::vector<Stage> stages_;
  std::string line_;
  std::vector<std::string> words_;
};

}  // namespace

Program::Program(const char* op, std::string_view text, const TensorShapes& shapes, int64_t in_features,
                 const LikelihoodSpec& likelihood, Norms norms)
    : stages(Parser(op, shapes, in_features, norms).run(text, likelihood.kind == Likelihood::kCategorical)) {
  int64_t numel = 0;
  for (const Stage& stage : stages) {
    numel += stage.out.numel();
  }
  FASTVAE_CHECK_VALUE(numel <= kMostNumel, op, "network", c10::str("at most ", kMostNumel, " numbers a sample"), numel);
}

int64_t Program::tape_numel() const {
  int64_t numel = output().numel();
  for (size_t i = 0; i + 1 < stages.size(); ++i) {
    numel += stages[i].out.numel() * (keeps_input(stages[i].activation.kind) ? 4 : 2);
  }
  return numel;
}

int64_t Program::forward_numel() const {
  int64_t numel = output().numel();
  for (size_t i = 0; i + 1 < stages.size(); ++i) {
    numel += stages[i].out.numel() * (keeps_input(stages[i].activation.kind) ? 2 : 1);
  }
  return numel;
}

TensorShapes shapes_of(at::TensorList tensors) {
  TensorShapes shapes;
  shapes.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    shapes.push_back(tensor.sizes().vec());
  }
  return shapes;
}

void check_room(const char* op, const char* argument, const Program& program, int64_t samples, int64_t points) {
  // The tapes of forward and reverse sweeps, of which four numbers for each of a layer are the most, and the point.
  const int64_t each = 4 * (program.tape_numel() + program.in_features());
  uint64_t all = 0, bytes = 0;
  const bool over = c10::mul_overflows(static_cast<uint64_t>(samples), static_cast<uint64_t>(points), &all) ||
                    c10::mul_overflows(all, static_cast<uint64_t>(each) * sizeof(double), &bytes) ||
                    bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  FASTVAE_CHECK_VALUE(!over, op, argument, "samples whose activations can be counted", samples);
}

int64_t checked_dim(const char* op, const at::Tensor& z) {
  check_floating(op, "z", z);
  FASTVAE_CHECK_VALUE(z.dim() == 2 && z.size(1) > 0, op, "z", "shape [B, d] with d > 0", describe(z));
  return z.size(1);
}

std::shared_ptr<const Program> find_program(const char* op, std::string_view text, at::TensorList tensors,
                                            int64_t in_features, const LikelihoodSpec& likelihood, Norms norms) {
  struct Entry {
    std::string text;
    TensorShapes shapes;
    int64_t in_features;
    Likelihood kind;
    int64_t classes;
    Norms norms;
    std::shared_ptr<const Program> program;
  };
  constexpr size_t kEntries = 8;
  static thread_local std::vector<Entry> entries;  // the last used first
  const auto matches = [&](const Entry& entry) {
    return entry.in_features == in_features && entry.kind == likelihood.kind && entry.classes == likelihood.classes &&
           entry.norms == norms && entry.shapes.size() == tensors.size() && entry.text == text &&
           std::equal(tensors.begin(), tensors.end(), entry.shapes.begin(),
                      [](const at::Tensor& tensor, const std::vector<int64_t>& shape) {
                        return tensor.sizes() == at::IntArrayRef(shape);
                      });
  };
  auto found = std::find_if(entries.begin(), entries.end(), matches);
  if (found == entries.end()) {
    TensorShapes shapes = shapes_of(tensors);
    auto program = std::make_shared<const Program>(op, text, shapes, in_features, likelihood, norms);
    if (entries.size() == kEntries) {
      entries.pop_back();
    }
    found = entries.insert(entries.end(), Entry{std::string(text), std::move(shapes), in_features, likelihood.kind,
                                                likelihood.classes, norms, std::move(program)});
  }
  std::rotate(entries.begin(), found, found + 1);
  return entries.front().program;
}

namespace {

// "'bernoulli', 'gaussian SCALE', ..."
std::string known_likelihoods() {
  std::string known;
#define FASTVAE_NAME(KIND, Head) \
  known += c10::str("'", Head<double>::kName, *Head<double>::kNumber == '\0' ? "" : " ", Head<double>::kNumber, "', ");
  FASTVAE_INDEPENDENT_HEADS(FASTVAE_NAME)
#undef FASTVAE_NAME
  return known + "or 'categorical CLASSES'";
}

}  // namespace

LikelihoodSpec parse_likelihood(const char* op, std::string_view text) {
  const std::vector<std::string> words = split(text, ' ');
  const auto is = [&](const char* name, size_t numbers) { return words.size() == numbers + 1 && words[0] == name; };
  LikelihoodSpec spec;
#define FASTVAE_TRY(KIND, Head)                                                                  \
  if (constexpr bool scaled = *Head<double>::kNumber != '\0'; is(Head<double>::kName, scaled)) { \
    spec.kind = Likelihood::KIND;                                                                \
    if (scaled) {                                                                                \
      spec.scale = to_number(op, "likelihood", words[1]);                                        \
      FASTVAE_CHECK_VALUE(spec.scale > 0.0, op, "likelihood", "a number > 0", spec.scale);       \
    }                                                                                            \
    return spec;                                                                                 \
  }
  FASTVAE_INDEPENDENT_HEADS(FASTVAE_TRY)
#undef FASTVAE_TRY
  FASTVAE_CHECK_VALUE(is("categorical", 1), op, "likelihood", known_likelihoods(), "'" + std::string(text) + "'");
  spec.kind = Likelihood::kCategorical;
  spec.classes = to_integer(op, "likelihood", words[1]);
  FASTVAE_CHECK_VALUE(spec.classes > 1, op, "likelihood", "at least 2 classes", spec.classes);
  return spec;
}

int64_t observed_numel(const char* op, const Program& program, const LikelihoodSpec& likelihood) {
  const SampleShape& out = program.output();
  if (likelihood.kind != Likelihood::kCategorical) {
    return out.numel();
  }
  FASTVAE_CHECK_VALUE(out.channels % likelihood.classes == 0, op, "network",
                      c10::str("output channels divisible by the ", likelihood.classes, " classes"), out.channels);
  return out.numel() / likelihood.classes;
}

LikelihoodSpec encoder_head() { return parse_likelihood("encoder", "gaussian 1"); }

std::shared_ptr<const Program> find_encoder(const char* op, std::string_view text, at::TensorList tensors,
                                            int64_t elements, int64_t latent_dim, int64_t samples, Norms norms) {
  std::shared_ptr<const Program> program = find_program(op, text, tensors, elements, encoder_head(), norms);
  check_room(op, "x", *program, samples);
  // An image of one pixel is a vector: the reshape that says so moves nothing.
  const SampleShape& out = program->output();
  FASTVAE_CHECK_VALUE((out.flat || out.positions() == 1) && out.numel() == 2 * latent_dim, op, "encoder",
                      c10::str(2 * latent_dim, " outputs in one vector"), out.numel());
  return program;
}

}  // namespace fastvae
