#include "geometry.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace fastvae {

std::string ConvolutionAxis::fault() const {
  const struct {
    const char* name;
    int64_t value, least;
  } numbers[] = {{"kernel", kernel, 1},
                 {"stride", stride, 1},
                 {"padding", padding, 0},
                 {"output_padding", output_padding, 0},
                 {"dilation", dilation, 1}};
  for (const auto& [name, value, least] : numbers) {
    if (value < least || value > kMostOfGeometry) {
      return c10::str("expected a ", name, " of ", least, " to ", kMostOfGeometry, ", got ", value);
    }
  }
  if (output_padding >= std::max(stride, dilation)) {
    return c10::str("expected an output_padding below the stride ", stride, " or the dilation ", dilation, ", got ",
                    output_padding);
  }
  return {};
}

int64_t ConvolutionAxis::convolved(int64_t in) const {
  const int64_t free = in + 2 * padding - reach();
  return free < 0 ? 0 : free / stride + 1;
}

int64_t ConvolutionAxis::transposed(int64_t in) const {
  return (in - 1) * stride - 2 * padding + reach() + output_padding;
}

}  // namespace fastvae
