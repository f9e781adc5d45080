// The rules of norm_activation.cpp where a group is a whole row of channels without positions: LayerNorm and RMSNorm.
// Mean and s are then one number a row, and gain and bias lie beside x.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../norm_activation.h"
#include "activation_rows.h"
#include "clones.h"
#include "lane_sum.h"

namespace fastvae::cpu {

template <typename T>
bool is_row_norm(const NormActivation<T>& args) {
  const bool of_groups = args.statistics == Statistics::kOfGroups || args.statistics == Statistics::kRootSquare;
  return of_groups && args.groups == 1 && args.positions == 1;
}

// Rows, and what is known of the one at hand.
template <typename T>
class NormRows {
 public:
  static constexpr int kLanes = 64;
  static constexpr int64_t kBlock = 512;

  FASTVAE_INLINE explicit NormRows(const NormActivation<T>& arguments)
      : args(arguments),
        n(arguments.channels),
        centred(arguments.statistics == Statistics::kOfGroups),
        ones_(static_cast<size_t>(arguments.gain == nullptr ? n : 0), T(1)),
        zeros_(static_cast<size_t>(arguments.bias == nullptr ? n : 0), T(0)),
        gain(arguments.gain == nullptr ? ones_.data() : arguments.gain),
        bias(arguments.bias == nullptr ? zeros_.data() : arguments.bias) {}

  // body(i, lane), of which each lane adds up its own.
  template <typename Body>
  FASTVAE_INLINE void each(int64_t count, const Body& body) const {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
#pragma GCC ivdep
      for (int lane = 0; lane < kLanes; ++lane) {
        body(i + lane, lane);
      }
    }
    for (int lane = 0; i + lane < count; ++lane) {
      body(i + lane, lane);
    }
  }

  FASTVAE_INLINE double mean_of(const T (&lanes)[kLanes]) const {
    double wide[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      wide[lane] = lanes[lane];
    }
    return combine_lanes(wide, [](double a, double b) FASTVAE_LAMBDA_INLINE { return a + b; }) / static_cast<double>(n);
  }

  // m and s of x's row, from what the forward rule kept.
  FASTVAE_INLINE void take(int64_t row) {
    m = centred ? args.mean[row] : T(0);
    s = args.s[row];
    take_affine(row);
  }

  FASTVAE_INLINE void take_affine(int64_t row) {
    gain = args.gain == nullptr ? gain : args.gain + args.affine_of(row);
    bias = args.bias == nullptr ? bias : args.bias + args.affine_of(row);
  }

  // The activation's derivatives at a block of a.
  FASTVAE_INLINE void derivatives(const T* x, int64_t at, int64_t count, bool curved) {
#pragma GCC ivdep
    for (int64_t j = 0; j < count; ++j) {
      a[j] = (x[at + j] - m) * s * gain[at + j] + bias[at + j];
    }
    activation_slopes(args.activation, a, slope, curved ? curvature : nullptr, count);
  }

  // xhatdot = s (xdot - first) - xhat second.
  FASTVAE_INLINE void along(const T* x, const T* x_dot) {
    T plain[kLanes] = {}, product[kLanes] = {};
    const T mean = m, inverse = s;
    each(n, [&](int64_t i, int lane) FASTVAE_LAMBDA_INLINE {
      plain[lane] += x_dot[i];
      product[lane] += x_dot[i] * ((x[i] - mean) * inverse);
    });
    first = centred ? static_cast<T>(mean_of(plain)) : T(0);
    second = s * static_cast<T>(mean_of(product));
  }

  const NormActivation<T>& args;
  const int64_t n;
  const bool centred;

 private:
  std::vector<T> ones_, zeros_;

 public:
  const T* gain;
  const T* bias;
  T m = T(0), s = T(1), first = T(0), second = T(0);
  T a[kBlock], slope[kBlock], curvature[kBlock];
};

template <typename T>
FASTVAE_INLINE void forward_rows(const NormActivation<T>& args, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = NormRows<T>::kBlock;
  NormRows<T> rows(args);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = args.x + row * rows.n;
    T* y = args.out + row * rows.n;
    T m = T(0);
    if (rows.centred) {
      T sum[NormRows<T>::kLanes] = {};
      rows.each(rows.n, [&](int64_t i, int lane) FASTVAE_LAMBDA_INLINE { sum[lane] += x[i]; });
      m = args.mean[row] = static_cast<T>(rows.mean_of(sum));
    }
    T squares[NormRows<T>::kLanes] = {};
    rows.each(rows.n, [&](int64_t i, int lane) FASTVAE_LAMBDA_INLINE { squares[lane] += (x[i] - m) * (x[i] - m); });
    const T s = args.s[row] = static_cast<T>(1.0 / std::sqrt(rows.mean_of(squares) + args.eps));
    rows.take_affine(row);
    for (int64_t at = 0; at < rows.n; at += kBlock) {
      const int64_t count = std::min(kBlock, rows.n - at);
#pragma GCC ivdep
      for (int64_t j = at; j < at + count; ++j) {
        y[j] = (x[j] - m) * s * rows.gain[j] + rows.bias[j];
      }
      activation_values(args.activation, y + at, y + at, count);
    }
  }
}

template <typename T>
FASTVAE_INLINE void reverse_rows(const NormActivation<T>& args, int64_t begin, int64_t end) {
  using Rows = NormRows<T>;
  Rows rows(args);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t x_row = row % args.x_samples;
    const T* x = args.x + x_row * rows.n;
    const T* dy = args.dy + row * rows.n;
    T* dx = args.out + row * rows.n;  // w, at first
    T* d_gain = args.d_gain == nullptr ? nullptr : args.d_gain + row * rows.n;
    T* d_bias = args.d_bias == nullptr ? nullptr : args.d_bias + row * rows.n;
    rows.take(x_row);
    const T m = rows.m, s = rows.s;
    T plain[Rows::kLanes] = {}, product[Rows::kLanes] = {};
    for (int64_t at = 0; at < rows.n; at += Rows::kBlock) {
      const int64_t count = std::min(Rows::kBlock, rows.n - at);
      rows.derivatives(x, at, count, false);
      const T* slope = rows.slope;
      if (d_gain != nullptr) {
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          d_gain[at + j] = slope[j] * dy[at + j] * ((x[at + j] - m) * s);
        }
      }
      if (d_bias != nullptr) {
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          d_bias[at + j] = slope[j] * dy[at + j];
        }
      }
      rows.each(count, [&](int64_t j, int lane) FASTVAE_LAMBDA_INLINE {
        const T w = slope[j] * dy[at + j] * rows.gain[at + j];
        plain[lane] += w;
        product[lane] += w * ((x[at + j] - m) * s);
        dx[at + j] = w;
      });
    }
    const T first = rows.centred ? static_cast<T>(rows.mean_of(plain)) : T(0);
    const T second = static_cast<T>(rows.mean_of(product));
#pragma GCC ivdep
    for (int64_t j = 0; j < rows.n; ++j) {
      dx[j] = s * (dx[j] - first - (x[j] - m) * s * second);
    }
  }
}

template <typename T>
FASTVAE_INLINE void tangent_rows(const NormActivation<T>& args, int64_t begin, int64_t end) {
  using Rows = NormRows<T>;
  Rows rows(args);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t x_row = row % args.x_samples;
    const T* x = args.x + x_row * rows.n;
    const T* x_dot = args.x_dot + row * rows.n;
    T* y_dot = args.out + row * rows.n;
    rows.take(x_row);
    rows.along(x, x_dot);
    const T m = rows.m, s = rows.s, first = rows.first, second = rows.second;
    for (int64_t at = 0; at < rows.n; at += Rows::kBlock) {
      const int64_t count = std::min(Rows::kBlock, rows.n - at);
      rows.derivatives(x, at, count, false);
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) {
        const T xhat_dot = s * (x_dot[at + j] - first) - (x[at + j] - m) * s * second;
        y_dot[at + j] = rows.slope[j] * rows.gain[at + j] * xhat_dot;
      }
    }
  }
}

template <typename T>
FASTVAE_INLINE void adjoint_rows(const NormActivation<T>& args, int64_t begin, int64_t end) {
  using Rows = NormRows<T>;
  Rows rows(args);
  std::vector<T> kept(static_cast<size_t>(rows.n));
  const std::vector<T> nothing(static_cast<size_t>(args.dy == nullptr || args.dy_dot == nullptr ? rows.n : 0), T(0));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t x_row = row % args.x_samples;
    const T* x = args.x + x_row * rows.n;
    const T* x_dot = args.x_dot + row * rows.n;
    const T* dy = args.dy == nullptr ? nothing.data() : args.dy + row * rows.n;
    const T* dy_dot = args.dy_dot == nullptr ? nothing.data() : args.dy_dot + row * rows.n;
    T* dx = args.out + row * rows.n;  // wdot, at first
    T* w = kept.data();
    T* d_gain = args.d_gain == nullptr ? nullptr : args.d_gain + row * rows.n;
    T* d_bias = args.d_bias == nullptr ? nullptr : args.d_bias + row * rows.n;
    rows.take(x_row);
    rows.along(x, x_dot);
    const T m = rows.m, s = rows.s, first = rows.first, second = rows.second;
    // Of w, w xhat, wdot, wdot xhat + w xhatdot.
    T sums[4][Rows::kLanes] = {};
    for (int64_t at = 0; at < rows.n; at += Rows::kBlock) {
      const int64_t count = std::min(Rows::kBlock, rows.n - at);
      rows.derivatives(x, at, count, true);
      T* delta = rows.slope;  // each in place of what it is made of
      T* delta_dot = rows.curvature;
      T* hat_dot = rows.a;
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) {
        hat_dot[j] = s * (x_dot[at + j] - first) - (x[at + j] - m) * s * second;
        delta_dot[j] = delta[j] * dy_dot[at + j] + delta_dot[j] * rows.gain[at + j] * hat_dot[j] * dy[at + j];
        delta[j] *= dy[at + j];
      }
      if (d_gain != nullptr) {
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          d_gain[at + j] = delta_dot[j] * ((x[at + j] - m) * s) + delta[j] * hat_dot[j];
        }
      }
      if (d_bias != nullptr) {
        std::copy_n(delta_dot, count, d_bias + at);
      }
      rows.each(count, [&](int64_t j, int lane) FASTVAE_LAMBDA_INLINE {
        const T xhat = (x[at + j] - m) * s;
        const T of_y = rows.gain[at + j] * delta[j], of_dot = rows.gain[at + j] * delta_dot[j];
        sums[0][lane] += of_y;
        sums[1][lane] += of_y * xhat;
        sums[2][lane] += of_dot;
        sums[3][lane] += of_dot * xhat + of_y * hat_dot[j];
        w[at + j] = of_y;
        dx[at + j] = of_dot;
      });
    }
    const T mean_w = rows.centred ? static_cast<T>(rows.mean_of(sums[0])) : T(0);
    const T mean_w_dot = rows.centred ? static_cast<T>(rows.mean_of(sums[2])) : T(0);
    const auto along = static_cast<T>(rows.mean_of(sums[1])), across = static_cast<T>(rows.mean_of(sums[3]));
    const T s_dot = -s * second;
#pragma GCC ivdep
    for (int64_t j = 0; j < rows.n; ++j) {
      const T xhat = (x[j] - m) * s;
      const T xhat_dot = s * (x_dot[j] - first) - xhat * second;
      dx[j] = s_dot * (w[j] - mean_w - xhat * along) + s * (dx[j] - mean_w_dot - xhat_dot * along - xhat * across);
    }
  }
}

}  // namespace fastvae::cpu
