// csrc/kernels/math against long double: ulps of the elementary functions in each instruction set that the kernels are
// cloned for, the two derivatives of the activations, and NaN, which must never be lost.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "examples.h"
#include "math/splitmix.h"

using fastvae::Activation;
using fastvae::ActivationSpec;
namespace math = fastvae::math;

namespace {

// CMakeLists.txt compiles this file once for each instruction set that the kernels are cloned for.
#if defined(__AVX512F__)
constexpr const char* kSet = "AVX-512";
bool supported() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"); }
#elif defined(__AVX2__)
constexpr const char* kSet = "AVX2";
bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
constexpr const char* kSet = "baseline";
bool supported() { return true; }
#endif
constexpr int kSkipped = 77;  // to ctest

// --- elementary functions
// ---------------------------------------------------------------------------------------------

template <typename T>
struct Elementary {
  const char* name;
  void (*loop)(const std::vector<T>& x, std::vector<T>& y);
  long double (*exact)(long double);
  T lowest;
  T highest;
  double ulps;  // the figure that elementary.h states
};

long double exact_exp(long double x) { return expl(x); }
long double exact_expm1(long double x) { return expm1l(x); }
long double exact_exp_excess(long double x) {
  // Summed from the small end near 0, where expm1 - x would cancel.
  if (fabsl(x) > 0.5L) {
    return expm1l(x) - x;
  }
  long double sum = 1.0L;
  for (int n = 30; n > 2; --n) {
    sum = 1.0L + sum * x / n;
  }
  return sum * x * x / 2.0L;
}
long double exact_log1p_unit(long double x) { return log1pl(x); }
long double exact_log(long double x) { return logl(x); }
long double exact_log1p(long double x) { return log1pl(x); }
long double exact_tanh(long double x) { return tanhl(x); }
long double exact_erf(long double x) { return erfl(x); }
long double exact_sigmoid(long double x) { return 1.0L / (1.0L + expl(-x)); }
long double exact_softplus(long double x) { return x > 0 ? x + log1pl(expl(-x)) : log1pl(expl(x)); }

template <typename T>
std::vector<Elementary<T>> elementary_functions() {
  using F = math::Ieee<T>;
  const T huge = std::numeric_limits<T>::max() / 4;
// Through a loop that the compiler vectorises, as in the kernels.
#define FUNCTION(NAME, LOWEST, HIGHEST, ULPS)            \
  Elementary<T> {                                        \
    #NAME,                                               \
        [](const std::vector<T>& x, std::vector<T>& y) { \
          for (size_t i = 0; i < x.size(); ++i) {        \
            y[i] = math::NAME(x[i]);                     \
          }                                              \
        },                                               \
        exact_##NAME, LOWEST, HIGHEST, ULPS              \
  }
  return {FUNCTION(exp, F::kLowest, F::kHighest, 1.1),
          FUNCTION(expm1, F::kLowest, F::kHighest, 2),
          FUNCTION(exp_excess, F::kLowest, F::kHighest, 16),
          FUNCTION(log1p_unit, T(0), T(1), 2),
          FUNCTION(log, std::numeric_limits<T>::min(), huge, 2),
          FUNCTION(log1p, T(-0.9), huge, 4),
          FUNCTION(tanh, -huge, huge, 3),
          FUNCTION(erf, -huge, huge, 1.5),
          FUNCTION(sigmoid, F::kLowest, huge, 3),
          FUNCTION(softplus, F::kLowest, huge, 3)};
#undef FUNCTION
}

// Half of the points uniform, half uniform in the exponent (down to where squares of numbers vanish), both signs.
template <typename T>
std::vector<T> points(T lowest, T highest, size_t count) {
  std::mt19937_64 random(20240917);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  std::vector<T> x = {lowest, highest, std::max(lowest, T(0)), T(-0.0)};
  const double near = std::min<double>(highest, 50.0);
  const double far = std::max<double>(lowest, -50.0);
  const double log_tiny = std::log(static_cast<double>(std::numeric_limits<T>::min()));
  while (x.size() < count) {
    const double u = uniform(random);
    x.push_back(static_cast<T>(far + u * (near - far)));
    const double positive = std::exp(log_tiny + u * (std::log(static_cast<double>(highest)) - log_tiny));
    x.push_back(std::min(static_cast<T>(positive), highest));
    if (lowest < 0) {
      const double negative = std::exp(log_tiny + u * (std::log(-static_cast<double>(lowest)) - log_tiny));
      x.push_back(std::max(static_cast<T>(-negative), lowest));
    }
  }
  return x;
}

// |got - exact| in units of the last place of `exact` in T (of the smallest normal number below it).
template <typename T>
double ulps_between(T got, long double exact) {
  int exponent = 0;
  frexpl(exact, &exponent);
  exponent = std::max(exponent, std::numeric_limits<T>::min_exponent);
  const long double ulp = ldexpl(1.0L, exponent - std::numeric_limits<T>::digits);
  return static_cast<double>(fabsl(static_cast<long double>(got) - exact) / ulp);
}

template <typename T>
void test_elementary(const char* type) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (const Elementary<T>& function : elementary_functions<T>()) {
    std::vector<T> x = points<T>(function.lowest, function.highest, 400000);
    x.push_back(nan);
    std::vector<long double> exact(x.size());
    std::transform(x.begin(), x.end(), exact.begin(), [&](T value) { return function.exact(value); });
    std::vector<T> y(x.size());
    function.loop(x, y);
    double worst = 0.0;
    T at = T(0);
    for (size_t i = 0; i + 1 < x.size(); ++i) {
      const double error = ulps_between(y[i], exact[i]);
      if (!(error <= worst)) {
        worst = error;
        at = x[i];
      }
    }
    std::printf("%-10s %-6s %s: at most %.2f ulp (at %.9g)\n", function.name, type, kSet, worst,
                static_cast<double>(at));
    CHECK(worst <= function.ulps, "%s %s %s: %.3f ulp at %.17g, stated %.1f", function.name, type, kSet, worst,
          static_cast<double>(at), function.ulps);
    CHECK(std::isnan(y.back()), "%s %s %s: NaN became %g", function.name, type, kSet, static_cast<double>(y.back()));
  }
  const T infinity = std::numeric_limits<T>::infinity();
  CHECK(math::tanh(infinity) == T(1) && math::tanh(-infinity) == T(-1), "tanh %s at infinity", type);
  CHECK(math::erf(infinity) == T(1) && math::erf(-infinity) == T(-1), "erf %s at infinity", type);
  CHECK(math::sigmoid(infinity) == T(1), "sigmoid %s at infinity", type);
  CHECK(math::sigmoid(-infinity) >= T(0) && math::sigmoid(-infinity) < std::numeric_limits<T>::min() * T(10),
        "sigmoid %s at -infinity", type);
  CHECK(math::softplus(infinity) == infinity, "softplus %s at infinity", type);
  CHECK(math::exp_excess(infinity) == infinity && math::exp_excess(-infinity) == infinity, "exp_excess %s at infinity",
        type);
  const math::SigmoidSoftplus<T> both = math::sigmoid_softplus(T(-1.25));
  CHECK(both.sigmoid == math::sigmoid(T(-1.25)) && both.softplus == math::softplus(T(-1.25)),
        "sigmoid_softplus %s differs from its halves", type);
}

// --- activations
// ------------------------------------------------------------------------------------------------------

long double exact_phi(const ActivationSpec& spec, long double a) {
  const auto first = static_cast<long double>(spec.first);
  switch (spec.kind) {
    case Activation::kIdentity:
      return a;
    case Activation::kRelu:
      return a > 0 ? a : 0;
    case Activation::kLeakyRelu:
      return a > 0 ? a : first * a;
    case Activation::kElu:
      return a > 0 ? a : first * expm1l(a);
    case Activation::kSelu:
      return 1.0507009873554804934193349852946L * (a > 0 ? a : 1.6732632423543772848170429916717L * expm1l(a));
    case Activation::kSoftplus:
    case Activation::kSoftplusSharp:
      return first * a > static_cast<long double>(spec.second) ? a : exact_softplus(first * a) / first;
    case Activation::kTanh:
      return tanhl(a);
    case Activation::kSigmoid:
      return exact_sigmoid(a);
    case Activation::kSilu:
      return a * exact_sigmoid(a);
    case Activation::kGelu:
      return 0.5L * a * (1 + erfl(a * sqrtl(0.5L)));
    case Activation::kMish:
      return a * tanhl(exact_softplus(a));
    case Activation::kGeluTanh:
      return 0.5L * a * (1 + tanhl(0.79788456080286535588L * (a + 0.044715L * a * a * a)));
  }
  return 0;
}

template <Activation kind, typename T>
void test_activation(const ActivationSpec& spec, const char* type) {
  const math::Phi<kind, T> phi(spec);
  // Central differences in long double: truncation h^2 phi''' / 6 and h^2 phi'''' / 12 (beta = 2.5 scales them by 16).
  const long double h = 1e-4L;
  const double tolerance = std::max(1e-6, 32.0 * std::numeric_limits<T>::epsilon());
  for (double point = -9.97; point < 10.0; point += 0.0371) {
    const T a = static_cast<T>(point);
    const auto exact_a = static_cast<long double>(a);
    const long double value = exact_phi(spec, exact_a);
    const long double up = exact_phi(spec, exact_a + h);
    const long double down = exact_phi(spec, exact_a - h);
    const auto slope = static_cast<double>((up - down) / (2 * h));
    const auto second = static_cast<double>((up - 2 * value + down) / (h * h));
    const bool kink = (spec.kind != Activation::kIdentity && std::abs(point) < 2e-4) ||
                      ((kind == Activation::kSoftplus || kind == Activation::kSoftplusSharp) &&
                       std::abs(spec.first * point - spec.second) < 1e-2);
    const T got_value = phi.value(a);
    const double value_error = std::abs(static_cast<double>(got_value) - static_cast<double>(value));
    CHECK(value_error <= 8.0 * std::numeric_limits<T>::epsilon() * (1.0 + std::abs(point)),
          "activation %d %s at %g: value off by %g", static_cast<int>(kind), type, point, value_error);
    if (kink) {
      continue;
    }
    const T s = fastvae::keeps_input(kind) ? a : got_value;
    const T got_slope = phi.slope(s);
    const T g = T(0.75);
    const T e = fastvae::keeps_input(kind) ? g : got_slope * g;
    const double got_second = static_cast<double>(phi.curvature(s, e)) / 0.75;
    CHECK(std::abs(static_cast<double>(got_slope) - slope) <= tolerance, "activation %d %s at %g: slope %g, not %g",
          static_cast<int>(kind), type, point, static_cast<double>(got_slope), slope);
    CHECK(std::abs(got_second - second) <= 4 * tolerance, "activation %d %s at %g: second derivative %g, not %g",
          static_cast<int>(kind), type, point, got_second, second);
  }
  const T nan = std::numeric_limits<T>::quiet_NaN();
  CHECK(std::isnan(phi.value(nan)), "activation %d %s loses a NaN", static_cast<int>(kind), type);
}

template <typename T>
void test_activations(const char* type) {
#define CASE(KIND, ...)                                                  \
  for (const ActivationSpec& spec : cases::examples(Activation::KIND)) { \
    test_activation<Activation::KIND, T>(spec, type);                    \
  }
  FASTVAE_ACTIVATION_KINDS(CASE)
#undef CASE
}

// --- heads
// ------------------------------------------------------------------------------------------------------------

// The three derivatives of a head, of its own density, against differences. The density itself is Python's to check.
template <typename Head>
void test_head(const Head& head) {
  constexpr double h = 1e-5, tolerance = 1e-8;
  for (const double x : {0.0, 1.0, 4.0, 0.3}) {
    if (Head::kDiscrete && x != std::floor(x)) {
      continue;
    }
    for (double a = -2.937; a < 3.0; a += 0.173) {
      const double residual = head.residual(a, x);
      const double slope = (head.both(a + h, x).log_prob - head.both(a - h, x).log_prob) / (2 * h);
      const double bend = (head.residual(a + h, x) - head.residual(a - h, x)) / (2 * h);
      const double cross = (head.residual(a, x + h) - head.residual(a, x - h)) / (2 * h);
      CHECK(std::abs(head.both(a, x).residual - residual) <= 1e-14, "%s at %g, %g: two residuals", Head::kName, a, x);
      CHECK(std::abs(residual - slope) <= tolerance * (1 + std::abs(slope)), "%s at %g, %g: residual %g, not %g",
            Head::kName, a, x, residual, slope);
      CHECK(std::abs(head.curvature(residual, x) - bend) <= tolerance * (1 + std::abs(bend)),
            "%s at %g, %g: curvature %g, not %g", Head::kName, a, x, head.curvature(residual, x), bend);
      CHECK(std::abs(head.cross(residual, x) - cross) <= tolerance * (1 + std::abs(cross)),
            "%s at %g, %g: cross derivative %g, not %g", Head::kName, a, x, head.cross(residual, x), cross);
    }
  }
}

// The derivatives of a likelihood of elements, of its own density, against differences.
template <typename Rules>
void test_element_head(const Rules& rules) {
  constexpr double h = 1e-5, tolerance = 1e-8;
  constexpr int n = Rules::kOutputs;
  for (const double x : {0.0, 1.0, 4.0}) {
    for (double a = -2.937; a < 3.0; a += 0.173) {
      for (const double b : {-3.1, -0.2, 1.3}) {
        double y[3] = {a, b, 0.7 - b}, r[3], up[3], down[3], bent[3];
        rules.first(y, x, r);
        for (int i = 0; i < n; ++i) {
          const double middle = y[i];
          y[i] = middle + h;
          const double above = rules.first(y, x, up);
          y[i] = middle - h;
          const double slope = (above - rules.first(y, x, down)) / (2 * h);
          y[i] = middle;
          CHECK(std::abs(r[i] - slope) <= tolerance * (1 + std::abs(slope)), "%s at %g, %g, %g: residual %d %g, not %g",
                Rules::kName, a, b, x, i, r[i], slope);
          const double v[3] = {i == 0 ? 1.0 : 0.0, i == 1 ? 1.0 : 0.0, i == 2 ? 1.0 : 0.0};
          rules.second(y, x, v, bent);
          for (int j = 0; j < n; ++j) {
            const double bend = (up[j] - down[j]) / (2 * h);
            CHECK(std::abs(bent[j] - bend) <= tolerance * (1 + std::abs(bend)),
                  "%s at %g, %g, %g: second derivative %d %d %g, not %g", Rules::kName, a, b, x, i, j, bent[j], bend);
          }
        }
      }
    }
  }
}

void test_heads() {
  for (const cases::ElementExample& of : cases::element_heads()) {
    cases::with_element_head(of.spec, [](const auto& rules) { test_element_head(rules); });
  }
#define CASE(KIND, Head) test_head(Head<double>(fastvae::LikelihoodSpec{fastvae::Likelihood::KIND, 0.7}));
  FASTVAE_INDEPENDENT_HEADS(CASE)
#undef CASE
}

// --- normal numbers
// ---------------------------------------------------------------------------------------------------

// cos(2 pi v), exact where it is small: the quarter turn is taken off before the multiplication.
long double exact_cos_turns(long double v) {
  const long double quarters = roundl(4.0L * v), angle = 6.283185307179586476925286766559L * (v - quarters / 4.0L);
  switch (static_cast<int>(quarters) % 4) {
    case 0:
      return cosl(angle);
    case 1:
      return -sinl(angle);
    case 2:
      return -cosl(angle);
    default:
      return sinl(angle);
  }
}

void test_normal() {
  // The published first outputs of the generator with seed 0.
  CHECK(math::keyed_bits(0, 0) == 0xE220A8397B1DCDAF && math::keyed_bits(0, 1) == 0x6E789E6AA1B965F4, "%s",
        "keyed_bits: not SplitMix64");
  std::vector<uint64_t> bits = {0, ~uint64_t{0}, 0x3FFFFFFF, 0x40000000, 0xBFFFFFFF, 0xFFFFFFFF00000000};
  while (bits.size() < 200000) {
    bits.push_back(math::keyed_bits(3, bits.size()));
  }
  std::vector<double> found(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) {
    found[i] = math::normal(bits[i]);
  }
  double worst = 0.0;
  for (size_t i = 0; i < bits.size(); ++i) {
    const auto unit = [](uint64_t half) { return (static_cast<long double>(half) + 0.5L) / 4294967296.0L; };
    const long double u = unit(bits[i] >> 32), v = unit(bits[i] & 0xFFFFFFFF);
    worst = std::max(worst, ulps_between(found[i], sqrtl(-2.0L * logl(u)) * exact_cos_turns(v)));
  }
  std::printf("%-10s %-6s %s: at most %.2f ulp\n", "normal", "double", kSet, worst);
  CHECK(worst <= 4.0, "normal %s: %.3f ulp", kSet, worst);
}

// --- classes
// ----------------------------------------------------------------------------------------------------------

template <typename T>
void test_classes(const char* type) {
  for (int64_t c = 0; c < 256; ++c) {
    const int64_t got = math::class_of(static_cast<T>(c) / T(255), 256);
    CHECK(got == c, "class_of %s: %d became %d", type, static_cast<int>(c), static_cast<int>(got));
  }
  const T infinity = std::numeric_limits<T>::infinity();
  for (const T wrong : {T(-3), -infinity, std::numeric_limits<T>::quiet_NaN()}) {
    CHECK(math::class_of(wrong, 256) == 0, "class_of %s(%g)", type, static_cast<double>(wrong));
  }
  for (const T wrong : {T(7), infinity, std::numeric_limits<T>::max()}) {
    CHECK(math::class_of(wrong, 256) == 255, "class_of %s(%g)", type, static_cast<double>(wrong));
  }
}

// Not in main(), which would then begin with instructions that the processor may not have.
[[gnu::noinline]] int run() {
  test_elementary<float>("float");
  test_elementary<double>("double");
  test_activations<float>("float");
  test_activations<double>("double");
  test_heads();
  test_normal();
  test_classes<float>("float");
  test_classes<double>("double");
  return check::finish("test_math");
}

}  // namespace

int main() {
  if (!supported()) {
    std::printf("test_math: this processor has no %s\n", kSet);
    return kSkipped;
  }
  return run();
}
