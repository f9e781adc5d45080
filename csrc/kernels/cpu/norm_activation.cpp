// y = phi(g xhat + b), xhat = (x - m) s over groups of n elements, s = (var + eps)^-1/2; with a = g xhat + b and
// P(w) = w - mean(w) - xhat mean(w xhat):
//
//   reverse   w = g phi'(a) dy:  dx = s P(w);  dg = phi'(a) dy xhat, db = phi'(a) dy
//   tangent   xhatdot = s P(xdot);  ydot = phi'(a) g xhatdot
//   adjoint   of <dydot, y> + <dy, ydot>: delta = phi'(a) dy, deltadot = phi'(a) dydot + phi''(a) g xhatdot dy,
//             w = g delta, wdot = g deltadot, sdot = -s^2 mean(xhat xdot):
//             dx = sdot P(w) + s (wdot - mean wdot - xhatdot mean(w xhat) - xhat (mean(wdot xhat) + mean(w xhatdot)))
//             dg = deltadot xhat + delta xhatdot, db = deltadot
//
// kernels/norm_activation.h counts the cost. A sample is walked in blocks of a few hundred numbers that stay in the
// first cache; sums are kept in lanes as long as a block, and added up at its channel's end.
#include "../norm_activation.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../kernels.h"
#include "activation_rows.h"
#include "clones.h"
#include "lane_sum.h"
#include "norm_rows.h"

namespace fastvae::cpu {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kSums = 5;

// In partial sums: one after the other, they wait for each other longer than the block took.
template <typename T>
FASTVAE_INLINE double total_of(const T* values, int64_t count) {
  LaneSum<double> sum;
  int64_t i = 0;
  for (; i + LaneSum<double>::kLanes <= count; i += LaneSum<double>::kLanes) {
#pragma GCC unroll 1
    for (int lane = 0; lane < LaneSum<double>::kLanes; ++lane) {
      sum.lanes[lane] += values[i + lane];
    }
  }
  for (int lane = 0; i + lane < count; ++lane) {
    sum.lanes[lane] += values[i + lane];
  }
  return sum.total();
}

// Of each channel, as a block reads it: with the channels last repeated over the positions of a block.
template <typename T>
struct Coefficients {
  std::vector<T> values;
  int64_t channels = 0;
  int64_t tile = 0;

  void resize(int64_t count, int64_t repeats) {
    channels = count;
    tile = repeats;
    values.resize(static_cast<size_t>(count * repeats));
  }
  T* data() { return values.data(); }
  // After the first `channels` were written.
  void repeat() {
    for (int64_t times = 1; times < tile; ++times) {
      std::copy_n(values.data(), channels, values.data() + times * channels);
    }
  }
};

// The blocks of a sample, and what is known of its channels.
template <typename T>
struct Walk {
  const NormActivation<T>& args;
  int64_t tile;   // positions of a block, with the channels last
  int64_t width;  // numbers of a block
  Coefficients<T> mean, s, scale, shift, gain, first, second, third, fourth;
  std::vector<T> lanes[kSums];
  std::vector<double> sums[kSums];  // a channel
  std::vector<double> group_sums[kSums];
  std::vector<T> a, slope, curvature;
  bool taken = false;

  explicit Walk(const NormActivation<T>& arguments) : args(arguments) {
    tile = args.channels_last ? std::max<int64_t>(1, std::min(args.positions, kBlock / args.channels)) : 1;
    width = args.channels_last ? tile * args.channels : kBlock;
    for (Coefficients<T>* each : {&mean, &s, &scale, &shift, &gain, &first, &second, &third, &fourth}) {
      each->resize(args.channels, tile);
    }
    for (int64_t k = 0; k < kSums; ++k) {
      lanes[k].resize(static_cast<size_t>(width));
      sums[k].resize(static_cast<size_t>(args.channels));
      group_sums[k].resize(static_cast<size_t>(args.groups));
    }
    for (std::vector<T>* each : {&a, &slope, &curvature}) {
      each->resize(static_cast<size_t>(width));
    }
    take_gain(0);
  }

  FASTVAE_INLINE void take_gain(int64_t x_sample) {
    for (int64_t c = 0; c < args.channels; ++c) {
      gain.data()[c] = args.gain == nullptr ? T(1) : args.gain[args.affine_of(x_sample) + c];
    }
    gain.repeat();
  }

  int64_t size() const { return args.channels * args.positions; }
  bool of_groups() const {
    return args.statistics == Statistics::kOfGroups || args.statistics == Statistics::kRootSquare;
  }
  bool centred() const { return args.statistics == Statistics::kOfGroups; }

  // Calls block(first number, how many, first channel). `count` sums are added up per channel behind it.
  template <typename Block>
  FASTVAE_INLINE void each_block(int64_t count, const Block& block) {
    for (int64_t k = 0; k < count; ++k) {
      std::fill(lanes[k].begin(), lanes[k].end(), T(0));
    }
    if (args.channels_last) {
      for (int64_t p = 0; p < args.positions; p += tile) {
        block(p * args.channels, std::min(tile, args.positions - p) * args.channels, int64_t{0});
      }
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t c = 0; c < args.channels; ++c) {
          double total = 0;
          for (int64_t times = 0; times < tile; ++times) {
            total += lanes[k][static_cast<size_t>(times * args.channels + c)];
          }
          sums[k][static_cast<size_t>(c)] = total;
        }
      }
      return;
    }
    for (int64_t c = 0; c < args.channels; ++c) {
      for (int64_t p = 0; p < args.positions; p += kBlock) {
        block(c * args.positions + p, std::min(kBlock, args.positions - p), c);
      }
      const int64_t used = std::min(kBlock, args.positions);
      for (int64_t k = 0; k < count; ++k) {
        const double total = total_of(lanes[k].data(), used);
        std::fill_n(lanes[k].begin(), used, T(0));
        sums[k][static_cast<size_t>(c)] = total;
      }
    }
  }

  // group_sums[k] = mean over a group of the channels' sums, each times its weight.
  FASTVAE_INLINE void into_groups(int64_t count, bool with_gain) {
    const int64_t each = args.channels / args.groups;
    const double share = 1.0 / static_cast<double>(std::max<int64_t>(1, each * args.positions));
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t g = 0; g < args.groups; ++g) {
        double total = 0;
        for (int64_t c = g * each; c < (g + 1) * each; ++c) {
          total += sums[k][static_cast<size_t>(c)] * (with_gain ? static_cast<double>(gain.data()[c]) : 1.0);
        }
        group_sums[k][static_cast<size_t>(g)] = total * share;
      }
    }
  }

  // A channel's coefficient from its group's mean.
  template <typename Value>
  FASTVAE_INLINE void spread(Coefficients<T>& into, const Value& value) {
    const int64_t each = args.channels / args.groups;
    for (int64_t c = 0; c < args.channels; ++c) {
      into.data()[c] = static_cast<T>(value(c, static_cast<size_t>(c / each)));
    }
    into.repeat();
  }

  // mean, s, scale and shift of x's sample, from what the forward rule kept; once where all samples share them.
  FASTVAE_INLINE void take_statistics(int64_t x_sample) {
    if (args.affine_samples > 1) {
      take_gain(x_sample);
    } else if (taken && !of_groups()) {
      return;
    }
    taken = true;
    const T* bias = args.bias == nullptr ? nullptr : args.bias + args.affine_of(x_sample);
    const int64_t each = args.channels / args.groups;
    for (int64_t c = 0; c < args.channels; ++c) {
      T m = T(0), inverse = T(1);
      if (args.statistics == Statistics::kGiven) {
        m = args.mean[c];
        inverse = args.s[c];
      } else if (of_groups()) {
        m = centred() ? args.mean[x_sample * args.groups + c / each] : T(0);
        inverse = args.s[x_sample * args.groups + c / each];
      }
      const T factor = inverse * gain.data()[c];
      mean.data()[c] = m;
      s.data()[c] = inverse;
      scale.data()[c] = factor;
      shift.data()[c] = (bias == nullptr ? T(0) : bias[c]) - m * factor;
    }
    for (Coefficients<T>* of : {&mean, &s, &scale, &shift}) {
      of->repeat();
    }
  }
};

// c[j] with the channels last, c[0] of one channel otherwise.
#define FASTVAE_AT(COEFFICIENTS, J) COEFFICIENTS[kLast ? (J) : 0]

template <typename T, bool kLast>
FASTVAE_INLINE void forward_samples(const NormActivation<T>& args, int64_t begin, int64_t end) {
  Walk<T> walk(args);
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* x = args.x + sample * walk.size();
    T* y = args.out + sample * walk.size();
    if (walk.of_groups()) {
      const int64_t each = args.channels / args.groups;
      if (walk.centred()) {
        walk.each_block(1, [&](int64_t at, int64_t n, int64_t) FASTVAE_LAMBDA_INLINE {
          T* lanes = walk.lanes[0].data();
#pragma GCC ivdep
          for (int64_t j = 0; j < n; ++j) {
            lanes[j] += x[at + j];
          }
        });
        walk.into_groups(1, false);
      } else {
        std::fill(walk.group_sums[0].begin(), walk.group_sums[0].end(), 0.0);
      }
      walk.spread(walk.mean, [&](int64_t, size_t g) { return walk.group_sums[0][g]; });
      for (int64_t g = 0; g < args.groups && walk.centred(); ++g) {
        args.mean[sample * args.groups + g] = walk.mean.data()[g * each];
      }
      walk.each_block(1, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
        T* lanes = walk.lanes[0].data();
        const T* m = walk.mean.data() + c;
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) {
          const T centred = x[at + j] - FASTVAE_AT(m, j);
          lanes[j] += centred * centred;
        }
      });
      walk.into_groups(1, false);
      for (int64_t g = 0; g < args.groups; ++g) {
        args.s[sample * args.groups + g] =
            static_cast<T>(1.0 / std::sqrt(walk.group_sums[0][static_cast<size_t>(g)] + args.eps));
      }
    }
    walk.take_statistics(sample);
    walk.each_block(0, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
      const T* scale = walk.scale.data() + c;
      const T* shift = walk.shift.data() + c;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        y[at + j] = x[at + j] * FASTVAE_AT(scale, j) + FASTVAE_AT(shift, j);
      }
      activation_values(args.activation, y + at, y + at, n);
    });
  }
}

// a of a block, and the activation's derivatives there.
template <typename T, bool kLast>
FASTVAE_INLINE void derivatives(Walk<T>& walk, const T* x, int64_t n, int64_t c, bool curved) {
  const T* scale = walk.scale.data() + c;
  const T* shift = walk.shift.data() + c;
  T* a = walk.a.data();
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    a[j] = x[j] * FASTVAE_AT(scale, j) + FASTVAE_AT(shift, j);
  }
  activation_slopes(walk.args.activation, a, walk.slope.data(), curved ? walk.curvature.data() : nullptr, n);
}

template <typename T>
FASTVAE_INLINE void write_affine(const Walk<T>& walk, int64_t sample, int64_t of_gain, int64_t of_bias) {
  const int64_t channels = walk.args.channels;
  for (int64_t c = 0; c < channels; ++c) {
    if (walk.args.d_gain != nullptr) {
      walk.args.d_gain[sample * channels + c] = static_cast<T>(walk.sums[of_gain][static_cast<size_t>(c)]);
    }
    if (walk.args.d_bias != nullptr) {
      walk.args.d_bias[sample * channels + c] = static_cast<T>(walk.sums[of_bias][static_cast<size_t>(c)]);
    }
  }
}

template <typename T, bool kLast>
FASTVAE_INLINE void reverse_samples(const NormActivation<T>& args, int64_t begin, int64_t end) {
  Walk<T> walk(args);
  const bool summed = walk.of_groups() || args.d_gain != nullptr || args.d_bias != nullptr;
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t x_sample = sample % args.x_samples;
    const T* x = args.x + x_sample * walk.size();
    const T* dy = args.dy + sample * walk.size();
    T* dx = args.out + sample * walk.size();
    walk.take_statistics(x_sample);
    walk.each_block(summed ? 2 : 0, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
      derivatives<T, kLast>(walk, x + at, n, c, false);
      const T* slope = walk.slope.data();
      if (!summed) {
        const T* scale = walk.scale.data() + c;
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) {
          dx[at + j] = slope[j] * dy[at + j] * FASTVAE_AT(scale, j);
        }
        return;
      }
      const T* m = walk.mean.data() + c;
      const T* s = walk.s.data() + c;
      T* of_bias = walk.lanes[0].data();
      T* of_gain = walk.lanes[1].data();
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T delta = slope[j] * dy[at + j];
        const T xhat = (x[at + j] - FASTVAE_AT(m, j)) * FASTVAE_AT(s, j);
        of_bias[j] += delta;
        of_gain[j] += delta * xhat;
        dx[at + j] = delta;
      }
    });
    if (!summed) {
      continue;
    }
    write_affine(walk, sample, 1, 0);
    if (!walk.of_groups()) {
      walk.each_block(0, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
        const T* scale = walk.scale.data() + c;
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) {
          dx[at + j] *= FASTVAE_AT(scale, j);
        }
      });
      continue;
    }
    // dx = s g delta - s mean(w) - xhat s mean(w xhat), as delta scale - x second - first.
    walk.into_groups(2, true);
    walk.spread(walk.second,
                [&](int64_t c, size_t g) { return walk.s.data()[c] * walk.s.data()[c] * walk.group_sums[1][g]; });
    walk.spread(walk.first,
                [&](int64_t c, size_t g) { return walk.centred() ? walk.s.data()[c] * walk.group_sums[0][g] : 0.0; });
    walk.each_block(0, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
      const T* scale = walk.scale.data() + c;
      const T* first = walk.first.data() + c;
      const T* second = walk.second.data() + c;
      const T* m = walk.mean.data() + c;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        dx[at + j] = dx[at + j] * FASTVAE_AT(scale, j) - FASTVAE_AT(first, j) -
                     (x[at + j] - FASTVAE_AT(m, j)) * FASTVAE_AT(second, j);
      }
    });
  }
}

// The coefficients of xhatdot = s (xdot - first - (x - m) second).
template <typename T>
FASTVAE_INLINE void along_groups(Walk<T>& walk, const T* x, const T* x_dot, bool last) {
  if (!walk.of_groups()) {
    std::fill(walk.first.values.begin(), walk.first.values.end(), T(0));
    std::fill(walk.second.values.begin(), walk.second.values.end(), T(0));
    return;
  }
  walk.each_block(2, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
    T* plain = walk.lanes[0].data();
    T* along = walk.lanes[1].data();
    const T* m = walk.mean.data() + c;
    const T* s = walk.s.data() + c;
    if (last) {
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        plain[j] += x_dot[at + j];
        along[j] += x_dot[at + j] * (x[at + j] - m[j]) * s[j];
      }
    } else {
      const T mean = m[0], inverse = s[0];
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        plain[j] += x_dot[at + j];
        along[j] += x_dot[at + j] * (x[at + j] - mean) * inverse;
      }
    }
  });
  walk.into_groups(2, false);
  walk.spread(walk.first, [&](int64_t, size_t g) { return walk.centred() ? walk.group_sums[0][g] : 0.0; });
  walk.spread(walk.second, [&](int64_t c, size_t g) { return walk.s.data()[c] * walk.group_sums[1][g]; });
}

template <typename T, bool kLast>
FASTVAE_INLINE void tangent_samples(const NormActivation<T>& args, int64_t begin, int64_t end) {
  Walk<T> walk(args);
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t x_sample = sample % args.x_samples;
    const T* x = args.x + x_sample * walk.size();
    const T* x_dot = args.x_dot + sample * walk.size();
    T* y_dot = args.out + sample * walk.size();
    walk.take_statistics(x_sample);
    along_groups(walk, x, x_dot, kLast);
    walk.each_block(0, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
      derivatives<T, kLast>(walk, x + at, n, c, false);
      const T* slope = walk.slope.data();
      const T* scale = walk.scale.data() + c;
      const T* first = walk.first.data() + c;
      const T* second = walk.second.data() + c;
      const T* m = walk.mean.data() + c;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T moved = x_dot[at + j] - FASTVAE_AT(first, j) - (x[at + j] - FASTVAE_AT(m, j)) * FASTVAE_AT(second, j);
        y_dot[at + j] = slope[j] * moved * FASTVAE_AT(scale, j);
      }
    });
  }
}

template <typename T, bool kLast>
FASTVAE_INLINE void adjoint_samples(const NormActivation<T>& args, int64_t begin, int64_t end) {
  Walk<T> walk(args);
  std::vector<T> kept(static_cast<size_t>(walk.of_groups() ? walk.size() : 0));
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t x_sample = sample % args.x_samples;
    const T* x = args.x + x_sample * walk.size();
    const T* x_dot = args.x_dot + sample * walk.size();
    const T* dy = args.dy == nullptr ? nullptr : args.dy + sample * walk.size();
    const T* dy_dot = args.dy_dot == nullptr ? nullptr : args.dy_dot + sample * walk.size();
    T* dx = args.out + sample * walk.size();
    walk.take_statistics(x_sample);
    along_groups(walk, x, x_dot, kLast);
    // Sums of delta, delta xhat, deltadot, deltadot xhat, delta xhatdot.
    walk.each_block(5, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
      derivatives<T, kLast>(walk, x + at, n, c, true);
      const T* slope = walk.slope.data();
      const T* curvature = walk.curvature.data();
      const T* gain = walk.gain.data() + c;
      const T* first = walk.first.data() + c;
      const T* second = walk.second.data() + c;
      const T* m = walk.mean.data() + c;
      const T* s = walk.s.data() + c;
      T* sum0 = walk.lanes[0].data();
      T* sum1 = walk.lanes[1].data();
      T* sum2 = walk.lanes[2].data();
      T* sum3 = walk.lanes[3].data();
      T* sum4 = walk.lanes[4].data();
      const bool grouped = walk.of_groups();
      T* keep = grouped ? kept.data() + at : walk.a.data();
      const T zero = T(0);
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T centred = x[at + j] - FASTVAE_AT(m, j);
        const T xhat = centred * FASTVAE_AT(s, j);
        const T xhat_dot = (x_dot[at + j] - FASTVAE_AT(first, j) - centred * FASTVAE_AT(second, j)) * FASTVAE_AT(s, j);
        const T of_dot = dy == nullptr ? zero : dy[at + j];
        const T of_y = dy_dot == nullptr ? zero : dy_dot[at + j];
        const T delta = slope[j] * of_dot;
        const T delta_dot = slope[j] * of_y + curvature[j] * FASTVAE_AT(gain, j) * xhat_dot * of_dot;
        sum0[j] += delta;
        sum1[j] += delta * xhat;
        sum2[j] += delta_dot;
        sum3[j] += delta_dot * xhat;
        sum4[j] += delta * xhat_dot;
        keep[j] = delta;
        dx[at + j] = delta_dot;
      }
    });
    if (args.d_gain != nullptr || args.d_bias != nullptr) {
      for (int64_t c = 0; c < args.channels; ++c) {
        const auto at = static_cast<size_t>(c);
        if (args.d_gain != nullptr) {
          args.d_gain[sample * args.channels + c] = static_cast<T>(walk.sums[3][at] + walk.sums[4][at]);
        }
        if (args.d_bias != nullptr) {
          args.d_bias[sample * args.channels + c] = static_cast<T>(walk.sums[2][at]);
        }
      }
    }
    if (!walk.of_groups()) {
      walk.each_block(0, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
        const T* scale = walk.scale.data() + c;
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) {
          dx[at + j] *= FASTVAE_AT(scale, j);
        }
      });
      continue;
    }
    // dx = s wdot + sdot w - s xhatdot mean(w xhat) - xhat (sdot mean(w xhat) + s mean(wdot xhat) + s mean(w xhatdot))
    //      - sdot mean(w) - s mean(wdot), with sdot = -s^2 mean(xhat xdot) = -s second'.
    walk.into_groups(5, true);
    const auto s_dot = [&](int64_t c) {
      // second = s mean(xhat xdot)
      return -static_cast<double>(walk.s.data()[c]) * static_cast<double>(walk.second.data()[c]);
    };
    walk.spread(walk.third, [&](int64_t c, size_t g) {  // of xhatdot s, where xhatdot = s (xdot - ...)
      return static_cast<double>(walk.s.data()[c]) * static_cast<double>(walk.s.data()[c]) * walk.group_sums[1][g];
    });
    walk.spread(walk.fourth, [&](int64_t c, size_t g) {  // of x - m
      const double s = walk.s.data()[c];
      return s * (s_dot(c) * walk.group_sums[1][g] + s * (walk.group_sums[3][g] + walk.group_sums[4][g]));
    });
    Coefficients<T>& constant = walk.shift;  // not needed any more
    walk.spread(constant, [&](int64_t c, size_t g) {
      return walk.centred() ? s_dot(c) * walk.group_sums[0][g] + walk.s.data()[c] * walk.group_sums[2][g] : 0.0;
    });
    walk.each_block(0, [&](int64_t at, int64_t n, int64_t c) FASTVAE_LAMBDA_INLINE {
      const T* scale = walk.scale.data() + c;
      const T* gain = walk.gain.data() + c;
      const T* first = walk.first.data() + c;
      const T* second = walk.second.data() + c;
      const T* third = walk.third.data() + c;
      const T* fourth = walk.fourth.data() + c;
      const T* shift = constant.data() + c;
      const T* m = walk.mean.data() + c;
      const T* s = walk.s.data() + c;
      const T* delta = kept.data() + at;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T centred = x[at + j] - FASTVAE_AT(m, j);
        const T moved = x_dot[at + j] - FASTVAE_AT(first, j) - centred * FASTVAE_AT(second, j);
        const T s_dot_of = -FASTVAE_AT(s, j) * FASTVAE_AT(second, j);
        dx[at + j] = dx[at + j] * FASTVAE_AT(scale, j) + delta[j] * FASTVAE_AT(gain, j) * s_dot_of -
                     moved * FASTVAE_AT(third, j) - centred * FASTVAE_AT(fourth, j) - FASTVAE_AT(shift, j);
      }
    });
  }
}

#undef FASTVAE_AT

#define FASTVAE_BY_LAYOUT(NAME)                                                                                      \
  template <typename T>                                                                                              \
  FASTVAE_INLINE void norm_activation_##NAME##_template(const NormActivation<T>& args, int64_t begin, int64_t end) { \
    if (is_row_norm(args)) {                                                                                         \
      NAME##_rows(args, begin, end);                                                                                 \
    } else if (args.channels_last) {                                                                                 \
      NAME##_samples<T, true>(args, begin, end);                                                                     \
    } else {                                                                                                         \
      NAME##_samples<T, false>(args, begin, end);                                                                    \
    }                                                                                                                \
  }

FASTVAE_BY_LAYOUT(forward)
FASTVAE_BY_LAYOUT(reverse)
FASTVAE_BY_LAYOUT(tangent)
FASTVAE_BY_LAYOUT(adjoint)

}  // namespace

FASTVAE_DEFINE_CPU(norm_activation_forward, NormActivation)
FASTVAE_DEFINE_CPU(norm_activation_reverse, NormActivation)
FASTVAE_DEFINE_CPU(norm_activation_tangent, NormActivation)
FASTVAE_DEFINE_CPU(norm_activation_adjoint, NormActivation)

}  // namespace fastvae::cpu
