// The numbers of a convolution along one axis: those that PyTorch refuses, and the size that the others give.
// fastvae/lowering/geometry.py holds the same rules.
#pragma once

#include <cstdint>
#include <string>

namespace fastvae {

// Of each number. Nobody needs more, and with sizes of at most kMostNumel nothing computed from them overflows.
constexpr int64_t kMostOfGeometry = int64_t{1} << 20;

struct ConvolutionAxis {
  int64_t kernel = 1, stride = 1, padding = 0, output_padding = 0, dilation = 1;

  // What is wrong with the numbers, or nothing.
  std::string fault() const;
  // The size of the output for an input of `in`; less than 1 where no window fits.
  int64_t convolved(int64_t in) const;
  int64_t transposed(int64_t in) const;

 private:
  int64_t reach() const { return dilation * (kernel - 1) + 1; }
};

}  // namespace fastvae
