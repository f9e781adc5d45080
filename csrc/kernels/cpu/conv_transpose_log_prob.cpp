// A last transposed convolution and its likelihood head in one go: the outputs of one phase of a row stay in the L1
// cache, the head reads them there, and the logits are never written to memory.
#include <vector>

#include "direct_convolution.h"
#include "head_runs.h"

namespace fastvae::cpu {
namespace {

// log p of one position: `outputs` numbers beside each other, and the elements of x that they are of.
template <typename T>
struct CategoricalPosition {
  int64_t classes;
  FASTVAE_INLINE explicit CategoricalPosition(const LikelihoodSpec& spec) : classes(spec.classes) {}
  FASTVAE_INLINE int64_t elements(int64_t outputs) const { return outputs / classes; }
  FASTVAE_INLINE T log_prob(const T* a, const T* bias, const T* x, int64_t outputs) const {
    T sum = T(0);
    for (int64_t c = 0; c < outputs; c += classes) {
      const int64_t chosen = math::class_of(*x++, classes);
      sum += bias == nullptr
                 ? categorical_run<false>(a + c, bias, chosen, classes, static_cast<T*>(nullptr)).log_prob
                 : categorical_run<true>(a + c, bias + c, chosen, classes, static_cast<T*>(nullptr)).log_prob;
    }
    return sum;
  }
};

template <typename Head, typename T>
struct IndependentPosition {
  Head head;
  FASTVAE_INLINE explicit IndependentPosition(const LikelihoodSpec& spec) : head(spec) {}
  FASTVAE_INLINE int64_t elements(int64_t outputs) const { return outputs; }
  FASTVAE_INLINE T log_prob(const T* a, const T* bias, const T* x, int64_t outputs) const {
    LaneSum<T> sum;
    T* no_residual = nullptr;
    if (bias == nullptr) {
      independent_head_run<Head, false>(head, a, bias, x, no_residual, outputs, true, sum);
    } else {
      independent_head_run<Head, true>(head, a, bias, x, no_residual, outputs, true, sum);
    }
    return sum.total();
  }
};

template <typename Position, typename T>
FASTVAE_INLINE void log_prob_samples(const ConvTransposeLogProb<T>& args, int64_t begin, int64_t end) {
  const ConvolutionWindow& w = args.layer.window;
  const Position position(args.likelihood);
  const int64_t elements = position.elements(w.channels);
  PhaseRows<T> phases(args.layer);
  std::vector<T> outputs((w.big_width + w.stride_width - 1) / w.stride_width * w.channels);
  for (int64_t sample = begin; sample < end; ++sample) {
    phases.load(sample);
    const T* image = args.x + sample * w.big_height * w.big_width * elements;
    double sum = 0.0;  // of thousands of terms of one sign
    for (int64_t y = 0; y < w.big_height; ++y) {
      phases.row(y, [&](int64_t first, int64_t columns, StridedProduct<T> product) FASTVAE_LAMBDA_INLINE {
        product.c = outputs.data();
        product.c_m = w.channels;
        strided_product(product);
        for (int64_t q = 0; q < columns; ++q) {
          const T* x = image + (y * w.big_width + first + q * w.stride_width) * elements;
          sum += static_cast<double>(position.log_prob(outputs.data() + q * w.channels, args.bias, x, w.channels));
        }
      });
    }
    args.log_prob[sample] = static_cast<T>(sum);
  }
}

template <typename T>
FASTVAE_INLINE void conv_transpose_log_prob_template(const ConvTransposeLogProb<T>& args, int64_t begin, int64_t end) {
  switch (args.likelihood.kind) {
    case Likelihood::kBernoulli:
      log_prob_samples<IndependentPosition<math::BernoulliHead<T>, T>>(args, begin, end);
      break;
    case Likelihood::kGaussian:
      log_prob_samples<IndependentPosition<math::GaussianHead<T>, T>>(args, begin, end);
      break;
    case Likelihood::kCategorical:
      log_prob_samples<CategoricalPosition<T>>(args, begin, end);
      break;
  }
}

}  // namespace

FASTVAE_DEFINE_CPU(conv_transpose_log_prob, ConvTransposeLogProb)

}  // namespace fastvae::cpu
