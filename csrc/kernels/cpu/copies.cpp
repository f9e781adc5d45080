// Networks of which every sample owns a copy (copies.h gives the formulas).
//
// Cost: memory bound. A step reads and writes value, mean and square once (24 bytes a number in float32) and reads
// value again for the product, unless that runs in the same pass; 2 to 4 FLOPs a number for the products, about 12, a
// root and a quotient for Adam. Rows whose input is zero cost nothing but their place in the loop.
#include <algorithm>

#include "../kernels.h"
#include "clones.h"
#include "lane_sum.h"

namespace fastvae::cpu {
namespace {

// Numbers that catch up together, in registers and L1.
constexpr int64_t kTile = 64;

// A row of one sample.
template <typename T>
struct Row {
  T* value;
  T* mean;
  T* square;
};

template <typename T>
FASTVAE_INLINE Row<T> row_of(const CopiedRows<T>& layer, int64_t row) {
  const int64_t first = row * layer.out;
  return {layer.value + first, layer.mean + first, layer.square + first};
}

template <typename T>
FASTVAE_INLINE void catch_up_row(const CopiedRows<T>& layer, int64_t row) {
  const int64_t seen = layer.seen[row], steps = layer.steps();
  if (seen == steps) {
    return;
  }
  const Row<T> at = row_of(layer, row);
  for (int64_t first = 0; first < layer.out; first += kTile) {
    const int64_t count = std::min(kTile, layer.out - first);
    for (int64_t step = seen; step < steps; ++step) {
      const math::AdamRate<T> rate = layer.rates[step];
#pragma GCC ivdep
      for (int64_t i = first; i < first + count; ++i) {
        math::adam(at.value[i], at.mean[i], at.square[i], T(0), layer.adam, rate);
      }
    }
  }
  layer.seen[row] = static_cast<int32_t>(steps);
}

template <typename T>
FASTVAE_INLINE T input_of(const CopiedRows<T>& layer, const T* h, int64_t sample, int64_t j) {
  return j < layer.in ? h[sample * layer.in + j] : T(1);
}

template <typename T>
FASTVAE_INLINE void add_product(T* a, const T* value, T h, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    a[i] += h * value[i];
  }
}

template <typename T>
FASTVAE_INLINE T dot(const T* a, const T* b, int64_t count) {
  LaneSum<T> sum;
  int64_t i = 0;
  for (; i + sum.kLanes <= count; i += sum.kLanes) {
#pragma GCC unroll 1
    for (int lane = 0; lane < sum.kLanes; ++lane) {
      sum.lanes[lane] += a[i + lane] * b[i + lane];
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    sum.lanes[lane] += a[i] * b[i];
  }
  return sum.total();
}

template <typename T>
FASTVAE_INLINE void update_row(const CopiesUpdate<T>& args, const Row<T>& at, const T* delta, T h,
                               const math::AdamRate<T>& rate) {
  const math::Adam<T> adam = args.layer.adam;
#pragma GCC ivdep
  for (int64_t i = 0; i < args.layer.out; ++i) {
    math::adam(at.value[i], at.mean[i], at.square[i], h * delta[i], adam, rate);
  }
}

}  // namespace

template <typename T>
FASTVAE_INLINE void adam_update_template(const AdamUpdate<T>& args, int64_t begin, int64_t end) {
  const math::Adam<T> adam = args.adam;
  const math::AdamRate<T> rate = args.rates[*args.taken];
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    math::adam(args.value[i], args.mean[i], args.square[i], args.grad[i], adam, rate);
  }
}

template <typename T>
FASTVAE_INLINE void adam_outer_template(const AdamOuter<T>& args, int64_t begin, int64_t end) {
  const math::Adam<T> adam = args.adam;
  const math::AdamRate<T> rate = args.rate;
  for (int64_t row = begin; row < end; ++row) {
    const T delta = args.delta[row];
    const T* h = args.h + row / args.out * args.in;
    T* value = args.value + row * args.in;
    T* mean = args.mean + row * args.in;
    T* square = args.square + row * args.in;
#pragma GCC ivdep
    for (int64_t i = 0; i < args.in; ++i) {
      math::adam(value[i], mean[i], square[i], delta * h[i], adam, rate);
    }
  }
}

template <typename T>
FASTVAE_INLINE void copies_product_template(const CopiesProduct<T>& args, int64_t begin, int64_t end) {
  const CopiedRows<T>& layer = args.layer;
  for (int64_t sample = begin; sample < end; ++sample) {
    T* a = args.a + sample * layer.out;
    std::fill_n(a, layer.out, T(0));
    for (int64_t j = 0; j < layer.rows(); ++j) {
      const T h = input_of(layer, args.h, sample, j);
      if (h != T(0)) {
        const int64_t row = sample * layer.rows() + j;
        catch_up_row(layer, row);
        add_product(a, row_of(layer, row).value, h, layer.out);
      }
    }
  }
}

template <typename T>
FASTVAE_INLINE void copies_update_template(const CopiesUpdate<T>& args, int64_t begin, int64_t end) {
  const CopiedRows<T>& layer = args.layer;
  const int64_t steps = layer.steps();
  const math::AdamRate<T> rate = layer.rates[steps];
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* delta = args.delta + sample * layer.out;
    T* next = args.next == nullptr ? nullptr : args.next + sample * layer.out;
    if (next != nullptr) {
      std::fill_n(next, layer.out, T(0));
    }
    for (int64_t j = 0; j < layer.rows(); ++j) {
      const int64_t row = sample * layer.rows() + j;
      const T h = input_of(layer, args.h, sample, j);
      const bool asked = args.grad_h != nullptr && j < layer.in;
      const bool idle = h == T(0);
      if (idle && (!asked || args.flat_at_zero)) {
        if (asked) {
          args.grad_h[sample * layer.in + j] = T(0);
        }
        continue;
      }
      catch_up_row(layer, row);
      const Row<T> at = row_of(layer, row);
      if (asked) {
        args.grad_h[sample * layer.in + j] = dot(at.value, delta, layer.out);
      }
      if (idle) {
        continue;
      }
      update_row(args, at, delta, h, rate);
      layer.seen[row] = static_cast<int32_t>(steps + 1);
      if (next != nullptr) {
        add_product(next, at.value, h, layer.out);
      }
    }
  }
}

template <typename T>
FASTVAE_INLINE void copies_catch_up_template(const CopiesCatchUp<T>& args, int64_t begin, int64_t end) {
  for (int64_t row = begin * args.layer.rows(); row < end * args.layer.rows(); ++row) {
    catch_up_row(args.layer, row);
  }
}

template <typename T>
FASTVAE_INLINE void copies_norm_template(const CopiesNorm<T>& args, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* gamma = args.affine + sample * args.channels;
    const T* beta = gamma + args.samples * args.channels;
    for (int64_t row = sample * args.positions; row < (sample + 1) * args.positions; ++row) {
      const T* h = args.h + row * args.channels;
      T* a = args.a + row * args.channels;
#pragma GCC ivdep
      for (int64_t c = 0; c < args.channels; ++c) {
        a[c] = (h[c] - args.mean[c]) * args.rstd[c] * gamma[c] + beta[c];
      }
    }
  }
}

template <typename T>
FASTVAE_INLINE void copies_norm_reverse_template(const CopiesNormReverse<T>& args, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* gamma = args.affine + sample * args.channels;
    T* grad_gamma = args.grad_affine + sample * args.channels;
    T* grad_beta = grad_gamma + args.samples * args.channels;
    std::fill_n(grad_gamma, args.channels, T(0));
    std::fill_n(grad_beta, args.channels, T(0));
    for (int64_t row = sample * args.positions; row < (sample + 1) * args.positions; ++row) {
      const T* delta = args.delta + row * args.channels;
      const T* h = args.h + row * args.channels;
#pragma GCC ivdep
      for (int64_t c = 0; c < args.channels; ++c) {
        grad_gamma[c] += delta[c] * (h[c] - args.mean[c]) * args.rstd[c];
        grad_beta[c] += delta[c];
      }
      if (args.grad_h != nullptr) {
        T* grad_h = args.grad_h + row * args.channels;
#pragma GCC ivdep
        for (int64_t c = 0; c < args.channels; ++c) {
          grad_h[c] = delta[c] * gamma[c] * args.rstd[c];
        }
      }
    }
  }
}

FASTVAE_DEFINE_CPU(adam_update, AdamUpdate)
FASTVAE_DEFINE_CPU(adam_outer, AdamOuter)
FASTVAE_DEFINE_CPU(copies_product, CopiesProduct)
FASTVAE_DEFINE_CPU(copies_update, CopiesUpdate)
FASTVAE_DEFINE_CPU(copies_catch_up, CopiesCatchUp)
FASTVAE_DEFINE_CPU(copies_norm, CopiesNorm)
FASTVAE_DEFINE_CPU(copies_norm_reverse, CopiesNormReverse)

}  // namespace fastvae::cpu
