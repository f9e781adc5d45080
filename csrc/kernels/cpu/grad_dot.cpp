// The product of two Gram tiles, summed over the terms of each pair of samples (kernels.h gives the formula).
//
// Cost: 2 reads and 2 FLOPs a pair of terms, out of L2, beside in + out multiply-adds in the products before it.
#include "../kernels.h"
#include "clones.h"

namespace fastvae::cpu {

// Partial sums of a run: vectorises without reassociation flags, and is the same in every run.
constexpr int kGramLanes = 16;

// sum of (of_inputs + bias) * of_grads over a run.
template <typename T>
FASTVAE_INLINE T product_of_run(const T* of_inputs, const T* of_grads, int64_t n, T bias) {
  T lanes[kGramLanes] = {};
  int64_t i = 0;
  for (; i + kGramLanes <= n; i += kGramLanes) {
    for (int lane = 0; lane < kGramLanes; ++lane) {
      lanes[lane] += (of_inputs[i + lane] + bias) * of_grads[i + lane];
    }
  }
  for (int lane = 0; i + lane < n; ++lane) {
    lanes[lane] += (of_inputs[i + lane] + bias) * of_grads[i + lane];
  }
  T sum = T(0);
  for (const T lane : lanes) {
    sum += lane;
  }
  return sum;
}

template <typename T>
FASTVAE_INLINE void gram_product_template(const GramProduct<T>& args, int64_t begin, int64_t end) {
  const T bias = args.bias ? T(1) : T(0);
  const int64_t columns = args.samples_b * args.terms_b;
  for (int64_t sample = begin; sample < end; ++sample) {
    T* out = args.out + sample * args.out_stride;
    const int64_t first = sample * args.terms_a * columns;
    if (args.terms_a == 1 && args.terms_b == 1) {
      const T* of_inputs = args.of_inputs + first;
      const T* of_grads = args.of_grads + first;
#pragma GCC ivdep
      for (int64_t j = 0; j < columns; ++j) {
        const T product = (of_inputs[j] + bias) * of_grads[j];
        out[j] = args.accumulate ? out[j] + product : product;
      }
      continue;
    }
    for (int64_t j = 0; j < args.samples_b; ++j) {
      T sum = T(0);
      for (int64_t t = 0; t < args.terms_a; ++t) {
        const int64_t run = first + t * columns + j * args.terms_b;
        sum += product_of_run(args.of_inputs + run, args.of_grads + run, args.terms_b, bias);
      }
      out[j] = args.accumulate ? out[j] + sum : sum;
    }
  }
}

FASTVAE_DEFINE_CPU(gram_product, GramProduct)

}  // namespace fastvae::cpu
