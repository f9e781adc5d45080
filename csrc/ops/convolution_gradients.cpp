// Per-sample weight gradients of a convolution, for the tiles of TracIn: each sample is a task of the kernel that sums
// a transposed convolution's gradient over samples, so that nothing but the gradients is written to memory.
#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/operator.h"
#include "../common/recycling.h"
#include "../network/geometry.h"

namespace fastvae {
namespace {

// [samples, kh kw, C of larger, C of smaller]; `larger` is what the window moves over (a convolution's input, a
// transposed one's output gradient).
at::Tensor convolution_gradients(const at::Tensor& larger, const at::Tensor& smaller, at::IntArrayRef kernel,
                                 at::IntArrayRef stride, at::IntArrayRef padding, int64_t samples) {
  constexpr const char* op = "convolution_gradients";
  const EntryGuard guard(op, larger);
  check_floating(op, "larger", larger);
  check_like(op, "smaller", smaller, larger, "larger");
  FASTVAE_CHECK_VALUE(larger.is_cpu(), op, "larger", "a CPU tensor", describe(larger));
  FASTVAE_CHECK_VALUE(larger.dim() == 4, op, "larger", "shape [rows, C, H, W]", describe(larger));
  FASTVAE_CHECK_VALUE(smaller.dim() == 4, op, "smaller", "shape [rows, C, h, w]", describe(smaller));
  FASTVAE_CHECK_VALUE(samples > 0 && larger.size(0) % samples == 0, op, "samples",
                      c10::str("a divisor of ", larger.size(0), " rows"), samples);
  for (const auto& [name, sizes] :
       {std::pair("kernel", kernel), std::pair("stride", stride), std::pair("padding", padding)}) {
    FASTVAE_CHECK_VALUE(sizes.size() == 2, op, name, "two numbers", sizes);
  }
  std::vector<int64_t> positions_of{larger.size(0), smaller.size(1)};
  for (size_t axis = 0; axis < 2; ++axis) {
    const ConvolutionAxis numbers{kernel[axis], stride[axis], padding[axis]};
    const std::string fault = numbers.fault();
    FASTVAE_CHECK_VALUE(fault.empty(), op, "kernel, stride, padding", "a convolution", fault);
    positions_of.push_back(numbers.convolved(larger.size(2 + axis)));
  }
  check_sizes(op, "smaller", smaller, positions_of);
  const at::Tensor images = larger.permute({0, 2, 3, 1}).contiguous();
  const at::Tensor positions = smaller.permute({0, 2, 3, 1}).contiguous();
  const ConvolutionWindow window{
      larger.size(1), smaller.size(2), smaller.size(3), larger.size(2), larger.size(3), kernel[0], kernel[1],
      stride[0],      stride[1],       padding[0],      padding[1],     /*dilation*/ 1, 1};
  if (larger.numel() == 0 || smaller.numel() == 0) {
    return aten::zeros({samples, kernel[0] * kernel[1], larger.size(1), smaller.size(1)}, larger.options());
  }
  at::Tensor out = recycled({samples, kernel[0] * kernel[1], larger.size(1), smaller.size(1)}, larger.options());
  FASTVAE_DISPATCH(larger, {
    const DirectConvTransposeGradient<scalar_t> args{images.const_data_ptr<scalar_t>(),
                                                     positions.const_data_ptr<scalar_t>(),
                                                     out.mutable_data_ptr<scalar_t>(),
                                                     smaller.size(1),
                                                     larger.size(0),
                                                     samples,
                                                     window};
    FASTVAE_LAUNCH_CPU(direct_conv_transpose_gradient, args, samples,
                       smaller.numel() / smaller.size(0) * larger.size(1));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae_internal, m) {
  define_internal<&convolution_gradients>(
      m,
      "convolution_gradients(Tensor larger, Tensor smaller, int[] kernel, int[] stride, int[] padding, int samples) "
      "-> Tensor");
}

}  // namespace fastvae
