// Straight code: calls of PyTorch's operators and of Python functions, written down as a list and made again.
//
// Cost: from here, a call of an operator costs some 0.3 us besides its own work; from Python, 1 to 3.
#pragma once

#include <pybind11/pybind11.h>

namespace fastvae {

// The class fastvae._C.StraightCode; fastvae/network/straight.py writes its calls.
void bind_straight_code(pybind11::module_& m);

}  // namespace fastvae
