// The kernels of copies.h against plain loops in double in which every number takes every step: rows whose input is
// zero for a while have to catch up to the same.
#pragma once

#include <algorithm>

#include "cases.h"

namespace cases {

struct CopiesCase {
  const char* name;
  int64_t samples, in, out, bias;
  bool first;         // the input stays, nobody asks for the gradient to it
  bool flat_at_zero;  // read only where first is false
};

inline std::vector<CopiesCase> copies_cases() {
  return {
      {"one number", 1, 1, 1, 0, true, false},
      {"a first layer", 3, 9, 70, 1, true, false},
      {"a first layer without bias", 2, 5, 16, 0, true, false},
      {"behind ReLU", 3, 13, 37, 1, false, true},
      {"behind another activation", 2, 7, 130, 0, false, false},
      {"more columns than threads", 4, 3, 300, 1, false, true},
      {"more rows than a block takes", 2, 150, 5, 1, true, false},
      {"as many, behind ReLU", 2, 131, 3, 0, false, true},
  };
}

// The numbers of a layer in double, and the formulas as they stand.
template <typename T>
struct PlainLayer {
  PlainLayer(const CopiedRows<T>& from, const CopiesCase& shape) : of(shape), settings(from.adam) {
    const int64_t size = shape.samples * from.rows() * shape.out;
    value.assign(from.value, from.value + size);
    mean.assign(from.mean, from.mean + size);
    square.assign(from.square, from.square + size);
  }

  double input(const T* h, int64_t sample, int64_t j) const {
    return j < of.in ? static_cast<double>(h[sample * of.in + j]) : 1.0;
  }

  // W h + b as [samples, out], and W^T delta as [samples, in].
  std::vector<double> product(const T* h) const {
    std::vector<double> a(of.samples * of.out, 0.0);
    each([&](int64_t sample, int64_t j, int64_t o, int64_t i) {
      a[sample * of.out + o] += input(h, sample, j) * value[i];
    });
    return a;
  }
  std::vector<double> transposed(const T* delta) const {
    std::vector<double> g(of.samples * of.in, 0.0);
    each([&](int64_t sample, int64_t j, int64_t o, int64_t i) {
      if (j < of.in) {
        g[sample * of.in + j] += static_cast<double>(delta[sample * of.out + o]) * value[i];
      }
    });
    return g;
  }

  void update(const T* h, const T* delta, const math::AdamRate<T>& rate) {
    each([&](int64_t sample, int64_t j, int64_t o, int64_t i) {
      const double g = input(h, sample, j) * static_cast<double>(delta[sample * of.out + o]) +
                       static_cast<double>(settings.decay) * value[i];
      mean[i] += static_cast<double>(settings.to_mean) * (g - mean[i]);
      square[i] =
          static_cast<double>(settings.keep_square) * square[i] + static_cast<double>(settings.to_square) * g * g;
      value[i] -= static_cast<double>(rate.step) * mean[i] /
                  (std::sqrt(square[i]) * static_cast<double>(rate.inverse_root) + static_cast<double>(settings.eps));
    });
  }

  template <typename Body>
  void each(const Body& body) const {
    const int64_t rows = of.in + of.bias;
    for (int64_t sample = 0; sample < of.samples; ++sample) {
      for (int64_t j = 0; j < rows; ++j) {
        for (int64_t o = 0; o < of.out; ++o) {
          body(sample, j, o, (sample * rows + j) * of.out + o);
        }
      }
    }
  }

  CopiesCase of;
  math::Adam<T> settings;
  std::vector<double> value, mean, square;
};

template <typename T>
double distance(const T* found, const std::vector<double>& expected) {
  double worst = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(static_cast<double>(found[i]) - expected[i]) / (1.0 + std::abs(expected[i]));
    worst = error <= worst ? worst : (std::isnan(error) ? HUGE_VAL : error);
  }
  return worst;
}

// Some steps of a layer whose inputs come to zero and back. run(args) calls the kernel of that argument struct.
template <typename T, typename Run>
void check_copies(const CopiesCase& c, const char* type, const Run& run) {
  constexpr int64_t kSteps = 7;
  // Sums of up to 300 terms, through seven steps.
  const double tolerance = 400.0 * std::numeric_limits<T>::epsilon();
  Arena<T> arena;
  const int64_t rows = c.in + c.bias, size = c.samples * rows * c.out;
  std::vector<int32_t> seen(c.samples * rows, 0);
  int32_t taken = 0;
  CopiedRows<T> layer{};
  layer.taken = &taken;
  layer.value = arena.random(size);
  layer.mean = arena.random(size);
  layer.square = arena.random(size, 0.0, 1.0);
  layer.seen = seen.data();
  layer.samples = c.samples;
  layer.in = c.in;
  layer.out = c.out;
  layer.bias = c.bias;
  layer.rates = reinterpret_cast<const math::AdamRate<T>*>(arena.random(2 * kSteps, 0.1, 0.5));
  layer.adam = {T(0.25), T(0.75), T(0.25), T(0.125), T(0.5)};
  PlainLayer<T> plain(layer, c);
  T* h = arena.random(c.samples * c.in);
  T* a = arena.output(c.samples * c.out);
  T* grad_h = arena.output(c.samples * c.in);
  T* partial = arena.scratch(c.samples * copies_chunks(rows) * c.out);
  double worst = 0.0;
  for (; taken < kSteps; ++taken) {
    if (!c.first || taken == 0) {
      const T* fresh = arena.random(c.samples * c.in);
      for (int64_t i = 0; i < c.samples * c.in; ++i) {
        h[i] = (i + taken / 2) % 3 == 0 ? T(0) : fresh[i];
      }
      run(CopiesProduct<T>{layer, h, a, partial});
    }
    worst = std::max(worst, distance(a, plain.product(h)));
    const T* delta = arena.random(c.samples * c.out);
    std::vector<double> expected = plain.transposed(delta);
    run(CopiesUpdate<T>{layer, h, delta, c.first ? nullptr : grad_h, c.first ? a : nullptr, c.flat_at_zero, partial});
    if (!c.first) {
      for (size_t i = 0; i < expected.size(); ++i) {
        expected[i] = c.flat_at_zero && h[i] == T(0) ? 0.0 : expected[i];
      }
      worst = std::max(worst, distance(grad_h, expected));
    }
    plain.update(h, delta, layer.rates[taken]);
  }
  run(CopiesCatchUp<T>{layer});
  worst = std::max({worst, distance(layer.value, plain.value), distance(layer.mean, plain.mean),
                    distance(layer.square, plain.square)});
  CHECK(worst <= tolerance, "copies, %s, %s: off by %g", c.name, type, worst);
  CHECK(std::all_of(seen.begin(), seen.end(), [](int32_t steps) { return steps == kSteps; }), "copies, %s, %s: %s",
        c.name, type, "a row has not seen all steps");
}

// Stored gradients, which are a dense layer's with one input.
template <typename T, typename Run>
void check_adam_update(const char* type, const Run& run) {
  constexpr int64_t kSize = 133;
  const math::AdamRate<T> rates[] = {{T(0.1), T(2)}, {T(0.3), T(1.5)}};
  const int32_t taken = 1;
  Arena<T> arena;
  AdamUpdate<T> args{arena.random(kSize),
                     arena.random(kSize),
                     arena.random(kSize, 0.0, 1.0),
                     arena.random(kSize),
                     kSize,
                     {T(0.25), T(0.75), T(0.25), T(0.125), T(0.5)},
                     rates,
                     &taken};
  const CopiedRows<T> layer{args.value, args.mean, args.square, nullptr, 1, 1, kSize, 0, nullptr, nullptr, args.adam};
  PlainLayer<T> plain(layer, {"", 1, 1, kSize, 0, false, false});
  const T one = T(1);
  plain.update(&one, args.grad, rates[taken]);
  run(args);
  const double worst = std::max(
      {distance(args.value, plain.value), distance(args.mean, plain.mean), distance(args.square, plain.square)});
  CHECK(worst <= 20.0 * std::numeric_limits<T>::epsilon(), "adam_update, %s: off by %g", type, worst);
}

template <typename T, typename Run>
void check_copies_norm(int64_t samples, int64_t positions, int64_t channels, const char* type, const Run& run) {
  Arena<T> arena;
  const int64_t size = samples * positions * channels;
  const T *h = arena.random(size), *delta = arena.random(size), *mean = arena.random(channels);
  const T *rstd = arena.random(channels, 0.5, 2.0), *affine = arena.random(samples * 2 * channels);
  T *a = arena.output(size), *grad_h = arena.output(size), *grad_affine = arena.output(samples * 2 * channels);
  std::vector<double> expected_a(size), expected_h(size), expected_affine(samples * 2 * channels, 0.0);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = i % channels, gamma = i / (positions * channels) * channels + c;
    const int64_t beta = gamma + samples * channels;
    const double normal = (static_cast<double>(h[i]) - static_cast<double>(mean[c])) * static_cast<double>(rstd[c]);
    expected_a[i] = normal * static_cast<double>(affine[gamma]) + static_cast<double>(affine[beta]);
    expected_h[i] = static_cast<double>(delta[i]) * static_cast<double>(affine[gamma]) * static_cast<double>(rstd[c]);
    expected_affine[gamma] += static_cast<double>(delta[i]) * normal;
    expected_affine[beta] += static_cast<double>(delta[i]);
  }
  run(CopiesNorm<T>{h, mean, rstd, affine, a, samples, positions, channels});
  run(CopiesNormReverse<T>{delta, h, mean, rstd, affine, grad_affine, grad_h, samples, positions, channels});
  const double worst =
      std::max({distance(a, expected_a), distance(grad_h, expected_h), distance(grad_affine, expected_affine)});
  CHECK(worst <= 100.0 * std::numeric_limits<T>::epsilon(), "copies_norm [%d, %d, %d] %s: off by %g",
        static_cast<int>(samples), static_cast<int>(positions), static_cast<int>(channels), type, worst);
  T* again = arena.output(samples * 2 * channels);
  run(CopiesNormReverse<T>{delta, h, mean, rstd, affine, again, nullptr, samples, positions, channels});
  CHECK(std::equal(again, again + samples * 2 * channels, grad_affine), "copies_norm_reverse, %s: %s", type,
        "without the gradient to its input it gives another one to its parameters");
}

template <typename T, typename Run>
void check_all_copies(const char* type, const Run& run) {
  for (const CopiesCase& c : copies_cases()) {
    check_copies<T>(c, type, run);
  }
  check_adam_update<T>(type, run);
  check_copies_norm<T>(1, 1, 1, type, run);
  check_copies_norm<T>(3, 5, 19, type, run);
  check_copies_norm<T>(2, 7, 70, type, run);
}

}  // namespace cases
