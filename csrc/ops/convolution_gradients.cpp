// Per-sample weight gradients of a convolution, for the tiles of TracIn: one sample at a time is unfolded into a core's
// L2 and multiplied there, so that nothing but the gradients is written to memory.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "../common/guard.h"
#include "../common/launch.h"
#include "ops.h"

namespace fastvae {

at::Tensor convolution_gradients(const at::Tensor& larger, const at::Tensor& smaller, at::IntArrayRef kernel,
                                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                 int64_t samples) {
  constexpr const char* op = "convolution_gradients";
  const EntryGuard guard(op, {larger, smaller});
  check_floating(op, "larger", larger);
  check_like(op, "smaller", smaller, larger, "larger");
  FASTVAE_CHECK_VALUE(larger.is_cpu(), op, "larger", "a CPU tensor", describe(larger));
  FASTVAE_CHECK_VALUE(larger.dim() == 4, op, "larger", "shape [rows, C, H, W]", describe(larger));
  FASTVAE_CHECK_VALUE(smaller.dim() == 4 && smaller.size(0) == larger.size(0), op, "smaller",
                      c10::str("shape [", larger.size(0), ", C, h, w]"), describe(smaller));
  FASTVAE_CHECK_VALUE(samples > 0 && larger.size(0) % samples == 0, op, "samples",
                      c10::str("a divisor of ", larger.size(0), " rows"), samples);
  for (const auto& [name, sizes] : {std::pair("kernel", kernel), std::pair("stride", stride),
                                    std::pair("padding", padding), std::pair("dilation", dilation)}) {
    FASTVAE_CHECK_VALUE(sizes.size() == 2, op, name, "two numbers", sizes);
  }
  const at::Tensor images = larger.permute({0, 2, 3, 1}).contiguous();
  const at::Tensor positions = smaller.permute({0, 2, 3, 1}).contiguous();
  const int64_t rows = larger.size(0) / samples, filters = smaller.size(1);
  const ConvolutionWindow window{larger.size(1), smaller.size(2), smaller.size(3), larger.size(2), larger.size(3),
                                 kernel[0],      kernel[1],       stride[0],       stride[1],      padding[0],
                                 padding[1],     dilation[0],     dilation[1]};
  const int64_t count = window.height * window.width, width = kernel[0] * kernel[1] * window.channels;
  at::Tensor out = at::empty({samples, filters, width}, larger.options());
  at::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;  // a worker thread has not entered by the entry guard
    const at::Tensor columns = at::empty({count, width}, larger.options());
    for (int64_t sample = begin; sample < end; ++sample) {
      at::Tensor gradient = out.select(0, sample);
      for (int64_t row = sample * rows; row < (sample + 1) * rows; ++row) {
        FASTVAE_DISPATCH(larger, {
          const Unfold<scalar_t> args{images.const_data_ptr<scalar_t>() + row * images.stride(0),
                                      columns.mutable_data_ptr<scalar_t>(), window, 1};
          cpu::unfold(args, 0, 1);
        });
        const at::Tensor of_row = positions.select(0, row).view({count, filters}).t();
        if (row == sample * rows) {
          at::mm_out(gradient, of_row, columns);
        } else {
          gradient.addmm_(of_row, columns);
        }
      }
    }
  });
  return out;
}

}  // namespace fastvae
