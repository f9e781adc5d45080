// fold and unfold against plain loops in float64, over windows with every stride, padding and dilation that moves an
// edge, and split into ranges: bitwise the same; and the strided product that the other convolutions are made of, in
// the blocks of every processor, with the matrix product on top of it. The transposed convolutions themselves:
// test_kernels.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cases.h"
#include "cpu/bfloat16_product.h"
#include "cpu/matrix_product.h"

namespace cases {
namespace {

struct ConvolutionCase {
  const char* name;
  int64_t samples;
  int64_t channels;
  int64_t height, width;
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];
  int64_t output_padding[2];

  // The larger image is the output of the transposed convolution.
  ConvolutionWindow window() const {
    const auto size = [&](int64_t in, int axis) {
      return (in - 1) * stride[axis] - 2 * padding[axis] + dilation[axis] * (kernel[axis] - 1) + output_padding[axis] +
             1;
    };
    return {channels,  height,    width,      size(height, 0), size(width, 1), kernel[0],  kernel[1],
            stride[0], stride[1], padding[0], padding[1],      dilation[0],    dilation[1]};
  }
};

std::vector<ConvolutionCase> convolution_cases() {
  return {
      {"one pixel", 1, 1, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, {0, 0}},
      {"the paper's last layer", 2, 1, 14, 14, {5, 5}, {2, 2}, {2, 2}, {1, 1}, {1, 1}},
      {"two vectors wide", 2, 2, 3, 33, {3, 4}, {1, 2}, {1, 0}, {1, 1}, {0, 1}},
      {"three channels, stride 3", 3, 3, 5, 7, {2, 3}, {3, 3}, {0, 1}, {1, 1}, {2, 1}},
      {"dilated", 2, 3, 4, 5, {3, 2}, {2, 1}, {2, 1}, {2, 3}, {1, 0}},
      {"gaps between the patches", 2, 2, 3, 4, {1, 2}, {3, 4}, {0, 0}, {1, 1}, {0, 3}},
      {"padding beyond the kernel", 1, 2, 6, 6, {2, 2}, {1, 1}, {2, 2}, {1, 1}, {0, 0}},
      {"many channels", 2, 19, 3, 2, {3, 3}, {2, 2}, {1, 1}, {1, 1}, {0, 1}},
      {"one row", 4, 3, 1, 17, {1, 5}, {1, 2}, {0, 2}, {1, 1}, {0, 1}},
  };
}

// Calls body(sample, y, x, i, j, row, column): tap (i, j) of position (y, x) meets pixel (row, column) of the larger
// image, or falls outside it.
template <typename Body>
void for_each_meeting(const ConvolutionWindow& w, int64_t samples, const Body& body) {
  for (int64_t sample = 0; sample < samples; ++sample) {
    for (int64_t y = 0; y < w.height; ++y) {
      for (int64_t x = 0; x < w.width; ++x) {
        for (int64_t i = 0; i < w.kernel_height; ++i) {
          for (int64_t j = 0; j < w.kernel_width; ++j) {
            body(sample, y, x, i, j, y * w.stride_height + i * w.dilation_height - w.padding_height,
                 x * w.stride_width + j * w.dilation_width - w.padding_width);
          }
        }
      }
    }
  }
}

bool inside(const ConvolutionWindow& w, int64_t row, int64_t column) {
  return row >= 0 && row < w.big_height && column >= 0 && column < w.big_width;
}

int64_t patch_of(const ConvolutionWindow& w, int64_t sample, int64_t y, int64_t x, int64_t i, int64_t j) {
  return ((((sample * w.height + y) * w.width + x) * w.kernel_height + i) * w.kernel_width + j) * w.channels;
}

int64_t pixel_of(const ConvolutionWindow& w, int64_t sample, int64_t row, int64_t column) {
  return ((sample * w.big_height + row) * w.big_width + column) * w.channels;
}

template <typename T>
void naive(const Unfold<T>& args, int64_t samples) {
  const ConvolutionWindow& w = args.window;
  for_each_meeting(w, samples, [&](int64_t n, int64_t y, int64_t x, int64_t i, int64_t j, int64_t row, int64_t column) {
    for (int64_t c = 0; c < w.channels; ++c) {
      args.columns[patch_of(w, n, y, x, i, j) + c] =
          inside(w, row, column) ? args.image[pixel_of(w, n, row, column) + c] : T(0);
    }
  });
}

template <typename T>
void naive(const Fold<T>& args, int64_t samples) {
  const ConvolutionWindow& w = args.window;
  std::vector<double> image(samples * w.big_height * w.big_width * w.channels, 0.0);
  for_each_meeting(w, samples, [&](int64_t n, int64_t y, int64_t x, int64_t i, int64_t j, int64_t row, int64_t column) {
    for (int64_t c = 0; inside(w, row, column) && c < w.channels; ++c) {
      image[pixel_of(w, n, row, column) + c] += args.columns[patch_of(w, n, y, x, i, j) + c];
    }
  });
  std::transform(image.begin(), image.end(), args.image, [](double value) { return static_cast<T>(value); });
}

template <typename T, typename Build>
void test_kernel(const char* kernel, const ConvolutionCase& c, const char* type, Build build) {
  // Sums of up to 50 products of size one.
  const double tolerance = 40.0 * std::numeric_limits<T>::epsilon();
  Arena<T> expected, whole, parts, untouched, before;
  naive(build(expected), c.samples);
  cpu_kernel(build(whole), 0, c.samples);
  const double error = difference(whole, expected);
  CHECK(error <= tolerance, "%s %s %s: off by %g", kernel, c.name, type, error);
  const auto args = build(parts);
  for (int64_t sample = c.samples; sample-- > 0;) {
    cpu_kernel(args, sample, sample + 1);
  }
  CHECK(same_bits(whole, parts), "%s %s %s: in parts it gives other bits", kernel, c.name, type);
  build(before);
  cpu_kernel(build(untouched), 0, 0);
  CHECK(same_bits(untouched, before), "%s %s %s: an empty range writes", kernel, c.name, type);
}

template <typename T>
void test_convolutions(const char* type) {
  for (const ConvolutionCase& c : convolution_cases()) {
    const ConvolutionWindow w = c.window();
    const int64_t image = c.samples * w.big_height * w.big_width * w.channels;
    const int64_t taps = w.kernel_height * w.kernel_width * w.channels;
    const int64_t columns = c.samples * w.height * w.width * taps;
    test_kernel<T>("unfold", c, type, [&](Arena<T>& arena) {
      const T* in = arena.random(image);
      return Unfold<T>{in, arena.output(columns), w, c.samples};
    });
    test_kernel<T>("fold", c, type, [&](Arena<T>& arena) {
      const T* in = arena.random(columns);
      return Fold<T>{in, arena.output(image), w, c.samples};
    });
  }
}

// Operands whose rows overlap, as those of windows do, of every size that leaves a remainder in some direction.
template <typename T>
void test_strided_product(const char* type, bool wide) {
  constexpr int64_t kRuns = 3, kInner = 5, kMost = 45;
  Arena<T> arena;
  const T* a = arena.random(kRuns * 70 + kMost * 4 + kInner);
  const T* b = arena.random(kRuns * kInner * kMost);
  for (const int64_t m : {1, 3, 4, 6, 9, 14, 17}) {
    for (const int64_t n : {1, 5, 8, 16, 23, 45}) {
      for (const bool accumulate : {false, true}) {
        T* c = arena.output(m * (n + 1));
        std::fill_n(c, m * (n + 1), T(2));
        const cpu::StridedProduct<T> product{a, 4, 1, 70, b, n, kInner * n, c, n + 1, m, n, kInner, kRuns, accumulate};
        cpu::strided_product(product, wide);
        double error = 0;
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            double sum = accumulate ? 2 : 0;
            for (int64_t run = 0; run < kRuns; ++run) {
              for (int64_t k = 0; k < kInner; ++k) {
                sum += double(a[i * 4 + k + run * 70]) * double(b[run * kInner * n + k * n + j]);
              }
            }
            error = std::max(error, std::abs(sum - double(c[i * (n + 1) + j])));
          }
          error = std::max(error, std::abs(2 - double(c[i * (n + 1) + n])));
        }
        CHECK(error <= 100.0 * std::numeric_limits<T>::epsilon(), "strided_product %s %s, %d x %d: off by %g", type,
              wide ? "wide" : "narrow", int(m), int(n), error);
      }
    }
  }
}

// As the processor rounds to bfloat16: to the nearest, ties to even.
double as_bfloat16(double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits = 0;
  std::memcpy(&bits, &narrow, sizeof(bits));
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  float rounded = 0;
  std::memcpy(&rounded, &bits, sizeof(bits));
  return rounded;
}

// Every way in which operands lie, sizes that leave a remainder in each direction, and several blocks and panels; rows
// are the same bits alone and among others.
template <typename T>
void test_matrix_product(const char* type, void (*multiply)(const cpu::MatrixProduct<T>&), double (*as_read)(double)) {
  struct Size {
    int64_t m, n, k;
  };
  for (const Size s : std::vector<Size>{{1, 1, 1},
                                        {3, 5, 7},
                                        {14, 32, 16},
                                        {29, 33, 300},
                                        {470, 47, 20},
                                        {15, 16, 257},
                                        {130, 70, 65},
                                        {17, 9, 1100}}) {
    for (const bool a_in_rows : {false, true}) {
      for (const bool b_in_rows : {false, true}) {
        for (const bool accumulate : {false, true}) {
          Arena<T> arena;
          const int64_t a_m = a_in_rows ? s.k + 1 : 1, a_k = a_in_rows ? 1 : s.m + 2;
          const int64_t b_k = b_in_rows ? s.n + 3 : 1, b_n = b_in_rows ? 1 : s.k + 1, c_m = s.n + 1;
          const T* a = arena.random((s.m + 2) * (s.k + 1));
          const T* b = arena.random((s.n + 3) * (s.k + 1));
          T* c = arena.output(s.m * c_m);
          T* alone = arena.output(c_m);
          std::fill_n(c, s.m * c_m, T(2));
          std::fill_n(alone, c_m, T(2));
          cpu::MatrixProduct<T> product{a, a_m, a_k, b, b_k, b_n, c, c_m, s.m, s.n, s.k, accumulate};
          multiply(product);
          const int64_t row = s.m / 2;
          product.a += row * a_m;
          product.c = alone;
          product.m = 1;
          multiply(product);
          double error = 0;
          for (int64_t i = 0; i < s.m; ++i) {
            for (int64_t j = 0; j < s.n; ++j) {
              double sum = accumulate ? 2 : 0;
              for (int64_t k = 0; k < s.k; ++k) {
                sum += as_read(double(a[i * a_m + k * a_k])) * as_read(double(b[k * b_k + j * b_n]));
              }
              error = std::max(error, std::abs(sum - double(c[i * c_m + j])));
            }
            error = std::max(error, std::abs(2 - double(c[i * c_m + s.n])));
          }
          CHECK(error <= 100.0 * std::numeric_limits<T>::epsilon() * std::sqrt(double(s.k)),
                "matrix_product %s, %d x %d x %d: off by %g", type, int(s.m), int(s.n), int(s.k), error);
          CHECK(std::equal(alone, alone + c_m, c + row * c_m), "matrix_product %s, %d x %d x %d: a row alone differs",
                type, int(s.m), int(s.n), int(s.k));
        }
      }
    }
  }
}

}  // namespace
}  // namespace cases

int main() {
  for (const bool wide : {false, true}) {
    if (wide && !fastvae::cpu::kWideRegisters) {
      continue;  // the processor lacks its instructions
    }
    cases::test_strided_product<float>("float", wide);
    cases::test_strided_product<double>("double", wide);
  }
  if (fastvae::cpu::kWideRegisters) {
    const auto as_it_is = [](double value) { return value; };
    cases::test_matrix_product<float>("float", &fastvae::cpu::matrix_product, as_it_is);
    cases::test_matrix_product<double>("double", &fastvae::cpu::matrix_product, as_it_is);
  }
  if (fastvae::cpu::kMultipliesBfloat16) {
    cases::test_matrix_product<float>("bfloat16", &fastvae::cpu::bfloat16_product, &cases::as_bfloat16);
  }
  cases::test_convolutions<float>("float");
  cases::test_convolutions<double>("double");
  return check::finish("test_convolution");
}
