// A last transposed convolution and its likelihood head in one go: the outputs of one phase of some rows stay in the L2
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
      const int64_t chosen = math::class_of(*x, classes);
      sum += math::class_defect(*x++);
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

// Bytes of outputs between product and head: in the L2 cache, beside the weights.
constexpr int64_t kOutputBytes = int64_t{128} * 1024;
// Outputs whose weights are copied at a time, to lie beside each other in the L1 cache for all positions: where they
// lie in the layer, rows apart, they would be fetched from L2 for every few positions.
constexpr int64_t kPanel = 32;

// The columns [n, n + width) of b, [runs, k, width].
template <typename T>
FASTVAE_INLINE void copy_panel(const StridedProduct<T>& p, int64_t n, int64_t width, T* panel) {
  for (int64_t run = 0; run < p.runs; ++run) {
    for (int64_t k = 0; k < p.k; ++k, panel += width) {
      std::copy_n(p.b + run * p.b_run + k * p.b_k + n, width, panel);
    }
  }
}

template <typename Position, typename T>
FASTVAE_INLINE void log_prob_samples(const ConvTransposeLogProb<T>& args, int64_t begin, int64_t end) {
  const ConvolutionWindow& w = args.layer.window;
  const Position position(args.likelihood);
  const int64_t elements = position.elements(w.channels);
  PhaseRows<T> phases(args.layer);
  const int64_t row_numel = (w.big_width + w.stride_width - 1) / w.stride_width * w.channels;
  const int64_t rows_at_once = std::max<int64_t>(1, kOutputBytes / static_cast<int64_t>(sizeof(T)) / row_numel);
  std::vector<T> outputs(rows_at_once * row_numel);
  std::vector<T> panel(w.kernel_height * w.kernel_width * args.layer.in_channels * kPanel);
  for (int64_t sample = begin; sample < end; ++sample) {
    phases.load(sample);
    const T* image = args.x + sample * w.big_height * w.big_width * elements;
    double sum = 0.0;  // of thousands of terms of one sign
    for (int64_t row_phase = 0; row_phase < w.stride_height; ++row_phase) {
      for (int64_t top = row_phase; top < w.big_height; top += rows_at_once * w.stride_height) {
        const int64_t bottom = std::min(w.big_height, top + rows_at_once * w.stride_height);
        for (int64_t phase = 0; phase < w.stride_width; ++phase) {
          const StridedProduct<T> all = phases.product(top, phase);
          for (int64_t n = 0; n < w.channels; n += kPanel) {
            const int64_t width = std::min(kPanel, w.channels - n);
            copy_panel(all, n, width, panel.data());
            StridedProduct<T> product = all;
            product.b = panel.data();
            product.b_k = width;
            product.b_run = product.k * width;
            product.n = width;
            product.c = outputs.data() + n;
            product.c_m = w.channels;
            for (int64_t y = top; y < bottom; y += w.stride_height) {
              strided_product(product);
              product.a += phases.row_stride();
              product.c += product.m * w.channels;
            }
          }
          const T* a = outputs.data();
          for (int64_t y = top; y < bottom; y += w.stride_height) {
            for (int64_t x = phase; x < w.big_width; x += w.stride_width, a += w.channels) {
              const T* pixel = image + (y * w.big_width + x) * elements;
              sum += static_cast<double>(position.log_prob(a, args.bias, pixel, w.channels));
            }
          }
        }
      }
    }
    args.log_prob[sample] = static_cast<T>(sum);
  }
}

template <typename T>
FASTVAE_INLINE void conv_transpose_log_prob_template(const ConvTransposeLogProb<T>& args, int64_t begin, int64_t end) {
  switch (args.likelihood.kind) {
#define FASTVAE_CASE(kind, Head)                                         \
  case Likelihood::kind:                                                 \
    log_prob_samples<IndependentPosition<Head<T>, T>>(args, begin, end); \
    break;
    FASTVAE_INDEPENDENT_HEADS(FASTVAE_CASE)
#undef FASTVAE_CASE
    case Likelihood::kCategorical:
      log_prob_samples<CategoricalPosition<T>>(args, begin, end);
      break;
  }
}

}  // namespace

FASTVAE_DEFINE_CPU(conv_transpose_log_prob, ConvTransposeLogProb)

}  // namespace fastvae::cpu
