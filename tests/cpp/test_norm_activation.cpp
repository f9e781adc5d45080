// The rules of a norm and an activation: both layouts agree, ranges of samples give the same bits, and the rules fit
// each other. <dy, tangent(xdot)> = <reverse(dy), xdot>, and the adjoint rule is the derivative of the reverse one, by
// central differences of the forward and reverse kernels in double precision.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cases.h"

namespace cases {
namespace {

struct Shape {
  int64_t samples, latents, channels, positions, groups;
};

// What one call needs; arrays hold [sample][channel][position], and are turned where the channels come last.
template <typename T>
class Problem {
 public:
  Problem(const Shape& shape, Statistics statistics, const ActivationSpec& activation, bool last)
      : shape_(shape), statistics_(statistics), activation_(activation), last_(last) {
    x = arena.random(rows(1));
    dy = arena.random(rows(shape.latents));
    dy_dot = arena.random(rows(shape.latents));
    x_dot = arena.random(rows(shape.latents));
    gain = arena.random(shape.channels, 0.5, 1.5);
    bias = arena.random(shape.channels);
    const bool given = statistics == Statistics::kGiven;
    const int64_t count = given ? shape.channels : shape.samples * shape.groups;
    mean = given ? arena.random(count) : arena.output(count);
    s = given ? arena.random(count, 0.5, 1.5) : arena.output(count);
  }

  int64_t rows(int64_t latents) const { return latents * shape_.samples * shape_.channels * shape_.positions; }

  NormActivation<T> arguments(T* out, int64_t latents) {
    NormActivation<T> args{};
    args.x = x;
    args.gain = gain;
    args.bias = bias;
    args.mean = statistics_ == Statistics::kRootSquare || statistics_ == Statistics::kNone ? nullptr : mean;
    args.s = statistics_ == Statistics::kNone ? nullptr : s;
    args.out = out;
    args.samples = latents * shape_.samples;
    args.x_samples = shape_.samples;
    args.channels = shape_.channels;
    args.positions = shape_.positions;
    args.groups = shape_.groups;
    args.eps = 1e-5;
    args.channels_last = last_;
    args.statistics = statistics_;
    args.activation = activation_;
    return args;
  }

  // In the layout of the call, or back from it.
  void turn(T* data, int64_t latents, bool back) const {
    if (!last_) {
      return;
    }
    std::vector<T> copy(data, data + rows(latents));
    const int64_t c = shape_.channels, p = shape_.positions;
    for (int64_t n = 0; n < latents * shape_.samples; ++n) {
      for (int64_t i = 0; i < c; ++i) {
        for (int64_t j = 0; j < p; ++j) {
          const int64_t first = (n * c + i) * p + j, other = (n * p + j) * c + i;
          data[back ? first : other] = copy[static_cast<size_t>(back ? other : first)];
        }
      }
    }
  }

  template <typename Kernel>
  std::vector<T> run(const Kernel& kernel, NormActivation<T> args, bool split) {
    if (split) {
      for (int64_t begin = 0; begin < args.samples; ++begin) {
        kernel(args, begin, begin + 1);
      }
    } else {
      kernel(args, 0, args.samples);
    }
    const int64_t latents = args.samples / shape_.samples;
    std::vector<T> found(args.out, args.out + rows(latents));
    turn(found.data(), latents, true);
    return found;
  }

  Arena<T> arena;
  T *x, *dy, *dy_dot, *x_dot, *gain, *bias, *mean, *s;

 private:
  Shape shape_;
  Statistics statistics_;
  ActivationSpec activation_;
  bool last_;
};

template <typename T>
struct Results {
  std::vector<T> y, dx, y_dot, adjoint, d_gain, d_bias, adjoint_gain, adjoint_bias;
};

constexpr auto kForward = [](const auto& args, int64_t begin, int64_t end) {
  cpu::norm_activation_forward(args, begin, end);
};
constexpr auto kReverse = [](const auto& args, int64_t begin, int64_t end) {
  cpu::norm_activation_reverse(args, begin, end);
};
constexpr auto kTangent = [](const auto& args, int64_t begin, int64_t end) {
  cpu::norm_activation_tangent(args, begin, end);
};
constexpr auto kAdjoint = [](const auto& args, int64_t begin, int64_t end) {
  cpu::norm_activation_adjoint(args, begin, end);
};

// All four at once; `moved`: x goes that far along the first latent's xdot.
template <typename T>
Results<T> all_of(const Shape& shape, Statistics statistics, const ActivationSpec& activation, bool last, bool split,
                  double moved = 0.0) {
  Problem<T> p(shape, statistics, activation, last);
  for (int64_t i = 0; i < p.rows(1); ++i) {
    p.x[i] += static_cast<T>(moved) * p.x_dot[i];
  }
  p.turn(p.x, 1, false);
  for (T* each : {p.dy, p.dy_dot, p.x_dot}) {
    p.turn(each, shape.latents, false);
  }
  Results<T> found;
  found.y = p.run(kForward, p.arguments(p.arena.output(p.rows(1)), 1), split);
  T* out = p.arena.output(p.rows(shape.latents));
  NormActivation<T> args = p.arguments(out, shape.latents);
  const int64_t affine = shape.latents * shape.samples * shape.channels;
  args.dy = p.dy;
  args.d_gain = p.arena.output(affine);
  args.d_bias = p.arena.output(affine);
  found.dx = p.run(kReverse, args, split);
  found.d_gain.assign(args.d_gain, args.d_gain + affine);
  found.d_bias.assign(args.d_bias, args.d_bias + affine);
  args.x_dot = p.x_dot;
  found.y_dot = p.run(kTangent, args, split);
  args.dy_dot = p.dy_dot;
  found.adjoint = p.run(kAdjoint, args, split);
  found.adjoint_gain.assign(args.d_gain, args.d_gain + affine);
  found.adjoint_bias.assign(args.d_bias, args.d_bias + affine);
  return found;
}

template <typename T>
double largest(const std::vector<T>& a, const std::vector<T>& b) {
  double worst = a.size() == b.size() ? 0.0 : 1e300;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    worst = std::max(worst, std::abs(double(a[i]) - double(b[i])));
  }
  return worst;
}

template <typename T>
void compare(const char* what, const Results<T>& a, const Results<T>& b, double tolerance, const char* type) {
  const std::pair<const char*, double> errors[] = {{"y", largest(a.y, b.y)},
                                                   {"dx", largest(a.dx, b.dx)},
                                                   {"ydot", largest(a.y_dot, b.y_dot)},
                                                   {"adjoint", largest(a.adjoint, b.adjoint)},
                                                   {"dgain", largest(a.d_gain, b.d_gain)},
                                                   {"dbias", largest(a.d_bias, b.d_bias)},
                                                   {"adjoint dgain", largest(a.adjoint_gain, b.adjoint_gain)},
                                                   {"adjoint dbias", largest(a.adjoint_bias, b.adjoint_bias)}};
  for (const auto& [name, error] : errors) {
    CHECK(error <= tolerance, "%s, %s %s: off by %g", what, type, name, error);
  }
}

double dot(const std::vector<double>& a, const double* b) {
  double total = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    total += a[i] * b[i];
  }
  return total;
}

void test_rules(const Shape& shape, Statistics statistics, const ActivationSpec& activation) {
  const Results<double> found = all_of<double>(shape, statistics, activation, false, false);
  compare("split into samples", found, all_of<double>(shape, statistics, activation, false, true), 0.0, "double");
  const Results<double> last = all_of<double>(shape, statistics, activation, true, false);
  compare("channels last", found, last, 1e-11, "double");
  compare("channels last, split", last, all_of<double>(shape, statistics, activation, true, true), 0.0, "double");
  compare("channels last", all_of<float>(shape, statistics, activation, false, false),
          all_of<float>(shape, statistics, activation, true, false), 2e-4, "float");

  Problem<double> p(shape, statistics, activation, false);
  const double forwards = dot(found.y_dot, p.dy), backwards = dot(found.dx, p.x_dot);
  CHECK(std::abs(forwards - backwards) <= 1e-10 * (1 + std::abs(forwards)), "<dy, ydot> = %g, <dx, xdot> = %g",
        forwards, backwards);
  if (shape.latents != 1 || activation.kind == Activation::kRelu) {
    return;
  }
  // d/dh reverse(dy) along xdot, and reverse(dy_dot) beside it.
  const double h = 1e-6;
  const Results<double> ahead = all_of<double>(shape, statistics, activation, false, false, h);
  const Results<double> behind = all_of<double>(shape, statistics, activation, false, false, -h);
  Problem<double> q(shape, statistics, activation, false);
  q.run(kForward, q.arguments(q.arena.output(q.rows(1)), 1), false);
  NormActivation<double> args = q.arguments(q.arena.output(q.rows(1)), 1);
  args.dy = q.dy_dot;
  args.d_gain = q.arena.output(shape.samples * shape.channels);
  args.d_bias = q.arena.output(shape.samples * shape.channels);
  const std::vector<double> of_dot = q.run(kReverse, args, false);
  double error = 0;
  for (size_t i = 0; i < found.adjoint.size(); ++i) {
    const double difference = (ahead.dx[i] - behind.dx[i]) / (2 * h) + of_dot[i];
    error = std::max(error, std::abs(difference - found.adjoint[i]));
  }
  for (size_t i = 0; i < found.adjoint_gain.size(); ++i) {
    const double gain = (ahead.d_gain[i] - behind.d_gain[i]) / (2 * h) + args.d_gain[i];
    const double bias = (ahead.d_bias[i] - behind.d_bias[i]) / (2 * h) + args.d_bias[i];
    error = std::max({error, std::abs(gain - found.adjoint_gain[i]), std::abs(bias - found.adjoint_bias[i])});
  }
  CHECK(error <= 2e-6, "adjoint against differences: off by %g", error);
}

}  // namespace
}  // namespace cases

int main() {
  using fastvae::Activation;
  using fastvae::ActivationSpec;
  using fastvae::Statistics;
  const ActivationSpec activations[] = {{},
                                        {Activation::kRelu},
                                        {Activation::kSilu},
                                        {Activation::kTanh},
                                        {Activation::kElu, 0.7},
                                        {Activation::kSoftplus, 1.3, 20.0}};
  for (const Statistics statistics :
       {Statistics::kNone, Statistics::kGiven, Statistics::kOfGroups, Statistics::kRootSquare}) {
    for (const ActivationSpec& activation : activations) {
      for (const cases::Shape& shape :
           {cases::Shape{3, 1, 6, 5, 2}, cases::Shape{2, 3, 4, 1, 1}, cases::Shape{1, 1, 3, 700, 3},
            cases::Shape{2, 1, 600, 2, 4}, cases::Shape{2, 1, 700, 1, 1}, cases::Shape{3, 1, 70, 1, 1}}) {
        cases::test_rules(shape, statistics, activation);
      }
    }
  }
  return check::finish("test_norm_activation");
}
