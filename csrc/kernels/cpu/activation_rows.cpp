// phi(a), phi'(a) and phi''(a), element by element; about 12 FLOPs for each exponential of a smooth activation.
#include "activation_rows.h"

#include "clones.h"

namespace fastvae::cpu {
namespace {

template <typename T>
struct Rows {
  ActivationSpec activation;
  const T* a;
  T* first;   // value, or slope
  T* second;  // curvature or null
};

template <Activation kind, typename T>
FASTVAE_INLINE void values_of(const Rows<T>& args, int64_t begin, int64_t end) {
  const math::Phi<kind, T> phi(args.activation);
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    args.first[i] = phi.value(args.a[i]);
  }
}

template <Activation kind, typename T>
FASTVAE_INLINE void slopes_of(const Rows<T>& args, int64_t begin, int64_t end) {
  const math::Phi<kind, T> phi(args.activation);
  if (args.second == nullptr) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      const T a = args.a[i];
      args.first[i] = phi.slope(keeps_input(kind) ? a : phi.value(a));
    }
    return;
  }
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const T a = args.a[i];
    const T s = keeps_input(kind) ? a : phi.value(a);
    const T slope = phi.slope(s);
    args.first[i] = slope;
    args.second[i] = phi.curvature(s, keeps_input(kind) ? T(1) : slope);
  }
}

template <typename T>
FASTVAE_INLINE void values_template(const Rows<T>& args, int64_t begin, int64_t end) {
  switch (args.activation.kind) { FASTVAE_EACH_ACTIVATION(values_of) }
}

template <typename T>
FASTVAE_INLINE void slopes_template(const Rows<T>& args, int64_t begin, int64_t end) {
  switch (args.activation.kind) { FASTVAE_EACH_ACTIVATION(slopes_of) }
}

FASTVAE_DEFINE_CPU(values, Rows)
FASTVAE_DEFINE_CPU(slopes, Rows)

}  // namespace

void activation_values(const ActivationSpec& activation, const float* a, float* value, int64_t n) {
  values(Rows<float>{activation, a, value, nullptr}, 0, n);
}
void activation_values(const ActivationSpec& activation, const double* a, double* value, int64_t n) {
  values(Rows<double>{activation, a, value, nullptr}, 0, n);
}
void activation_slopes(const ActivationSpec& activation, const float* a, float* slope, float* curvature, int64_t n) {
  slopes(Rows<float>{activation, a, slope, curvature}, 0, n);
}
void activation_slopes(const ActivationSpec& activation, const double* a, double* slope, double* curvature, int64_t n) {
  slopes(Rows<double>{activation, a, slope, curvature}, 0, n);
}

}  // namespace fastvae::cpu
