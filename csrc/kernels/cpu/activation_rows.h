// phi, phi' and phi'' of a row of numbers, for kernels that do something else around them.
#pragma once

#include <cstdint>

#include "../math/activations.h"

namespace fastvae::cpu {

// value = phi(a); may be a.
void activation_values(const ActivationSpec& activation, const float* a, float* value, int64_t n);
void activation_values(const ActivationSpec& activation, const double* a, double* value, int64_t n);

// slope = phi'(a), which may be a, and curvature = phi''(a) or null.
void activation_slopes(const ActivationSpec& activation, const float* a, float* slope, float* curvature, int64_t n);
void activation_slopes(const ActivationSpec& activation, const double* a, double* slope, double* curvature, int64_t n);

}  // namespace fastvae::cpu
