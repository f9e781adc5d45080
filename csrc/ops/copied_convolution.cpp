// Convolutions of which every sample owns the weights: check, lay out, launch.
#include "copied_convolution.h"

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/recycling.h"
#include "../network/geometry.h"

namespace fastvae {
namespace {

constexpr const char* kOp = "copied_convolution";

void check_images(const char* name, const at::Tensor& images, size_t dims) {
  check_floating(kOp, name, images);
  FASTVAE_CHECK_VALUE(images.is_cpu(), kOp, name, "a CPU tensor", describe(images));
  FASTVAE_CHECK_VALUE(images.dim() == static_cast<int64_t>(dims) + 2, kOp, name,
                      c10::str("shape [rows, channels, ...] of ", dims, " more dimensions"), describe(images));
}

// [rows, ..., channels] in this order in memory, and back.
at::Tensor channels_behind(const at::Tensor& images) { return images.movedim(1, -1).contiguous(); }
at::Tensor channels_second(const at::Tensor& images) { return images.movedim(-1, 1); }

template <typename T>
const T* data_or_null_of(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->const_data_ptr<T>() : nullptr;
}

std::optional<at::Tensor> checked_bias(const std::optional<at::Tensor>& bias, const at::Tensor& like,
                                       at::IntArrayRef sizes) {
  if (!bias.has_value() || !bias->defined()) {
    return std::nullopt;
  }
  check_like(kOp, "bias", *bias, like, "the images");
  check_sizes(kOp, "bias", *bias, sizes);
  return bias->contiguous();
}

}  // namespace

CopiedConvolutionRules::CopiedConvolutionRules(const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                               const std::vector<int64_t>& padding,
                                               const std::vector<int64_t>& dilation, int64_t groups)
    : dims_(kernel.size()) {
  FASTVAE_CHECK_VALUE(dims_ >= 1 && dims_ <= kCopiedAxes, kOp, "kernel", "one to three numbers",
                      at::IntArrayRef(kernel));
  for (const auto& [name, sizes] : {std::pair("stride", &stride), {"padding", &padding}, {"dilation", &dilation}}) {
    FASTVAE_CHECK_VALUE(sizes->size() == dims_, kOp, name, c10::str(dims_, " numbers"), at::IntArrayRef(*sizes));
  }
  FASTVAE_CHECK_VALUE(groups > 0, kOp, "groups", "at least 1", groups);
  numbers_.groups = groups;
  for (size_t axis = 0; axis < kCopiedAxes; ++axis) {
    const bool is_there = axis + dims_ >= kCopiedAxes;
    const size_t at = is_there ? axis + dims_ - kCopiedAxes : 0;
    numbers_.kernel[axis] = is_there ? kernel[at] : 1;
    numbers_.stride[axis] = is_there ? stride[at] : 1;
    numbers_.padding[axis] = is_there ? padding[at] : 0;
    numbers_.dilation[axis] = is_there ? dilation[at] : 1;
    const ConvolutionAxis numbers{numbers_.kernel[axis], numbers_.stride[axis], numbers_.padding[axis], 0,
                                  numbers_.dilation[axis]};
    const std::string fault = numbers.fault();
    FASTVAE_CHECK_VALUE(fault.empty(), kOp, "kernel, stride, padding, dilation", "a convolution", fault);
  }
}

CopiedWindow CopiedConvolutionRules::window(at::IntArrayRef larger, at::IntArrayRef smaller) const {
  CopiedWindow found = numbers_;
  found.channels = larger[1];
  found.filters = smaller[1];
  FASTVAE_CHECK_VALUE(larger[1] % found.groups == 0 && smaller[1] % found.groups == 0, kOp, "groups",
                      c10::str("a divisor of ", larger[1], " channels and ", smaller[1], " filters"), found.groups);
  for (size_t axis = 0; axis < kCopiedAxes; ++axis) {
    const bool is_there = axis + dims_ >= kCopiedAxes;
    const size_t at = 2 + (is_there ? axis + dims_ - kCopiedAxes : 0);
    found.big[axis] = is_there ? larger[at] : 1;
    found.small[axis] = is_there ? smaller[at] : 1;
    const ConvolutionAxis numbers{found.kernel[axis], found.stride[axis], found.padding[axis], 0, found.dilation[axis]};
    // A transposed convolution's output padding makes room for more windows than there are positions.
    FASTVAE_CHECK_VALUE(found.small[axis] >= 1 && found.small[axis] <= numbers.convolved(found.big[axis]), kOp,
                        "smaller", c10::str("at most ", numbers.convolved(found.big[axis]), " positions"),
                        found.small[axis]);
  }
  return found;
}

void CopiedConvolutionRules::check_weight(const at::Tensor& weight, const at::Tensor& images, int64_t channels,
                                          int64_t filters) const {
  check_like(kOp, "weight", weight, images, "the images");
  FASTVAE_CHECK_VALUE(weight.dim() == 4 && weight.size(0) > 0 && images.size(0) % weight.size(0) == 0, kOp, "weight",
                      c10::str("shape [B, taps, channels, filters] with a B that divides ", images.size(0)),
                      describe(weight));
  check_sizes(kOp, "weight", weight, {weight.size(0), numbers_.taps(), channels / numbers_.groups, filters});
}

at::Tensor CopiedConvolutionRules::smaller(const at::Tensor& larger, const at::Tensor& weight,
                                           const std::optional<at::Tensor>& bias) const {
  const EntryGuard guard(kOp, larger);
  check_images("larger", larger, dims_);
  FASTVAE_CHECK_VALUE(weight.dim() == 4, kOp, "weight", "four dimensions", describe(weight));
  const int64_t filters = weight.size(3);
  check_weight(weight, larger, larger.size(1), filters);
  std::vector<int64_t> sizes{larger.size(0), filters};
  for (size_t at = 0; at < dims_; ++at) {
    const size_t axis = at + kCopiedAxes - dims_;
    const ConvolutionAxis numbers{numbers_.kernel[axis], numbers_.stride[axis], numbers_.padding[axis], 0,
                                  numbers_.dilation[axis]};
    sizes.push_back(numbers.convolved(larger.size(static_cast<int64_t>(at) + 2)));
  }
  const CopiedWindow found = window(larger.sizes(), sizes);
  const auto own_bias = checked_bias(bias, larger, {weight.size(0), filters});
  const at::Tensor big = channels_behind(larger), own = weight.contiguous();
  std::vector<int64_t> behind(sizes.begin() + 2, sizes.end());
  behind.insert(behind.begin(), sizes[0]);
  behind.push_back(filters);
  at::Tensor out = recycled(behind, larger.options());
  FASTVAE_DISPATCH(larger, {
    const CopiedConvolution<scalar_t> args{const_cast<scalar_t*>(big.const_data_ptr<scalar_t>()),
                                           out.mutable_data_ptr<scalar_t>(),
                                           const_cast<scalar_t*>(own.const_data_ptr<scalar_t>()),
                                           data_or_null_of<scalar_t>(own_bias),
                                           larger.size(0) / weight.size(0),
                                           found};
    FASTVAE_LAUNCH_CPU(copied_convolution_small, args, weight.size(0), kGrain);
  });
  return channels_second(out);
}

at::Tensor CopiedConvolutionRules::larger(const at::Tensor& smaller, const at::Tensor& weight,
                                          const std::optional<at::Tensor>& bias,
                                          const std::vector<int64_t>& sizes) const {
  const EntryGuard guard(kOp, smaller);
  check_images("smaller", smaller, dims_);
  FASTVAE_CHECK_VALUE(weight.dim() == 4, kOp, "weight", "four dimensions", describe(weight));
  FASTVAE_CHECK_VALUE(sizes.size() == dims_, kOp, "sizes", c10::str(dims_, " numbers"), at::IntArrayRef(sizes));
  const int64_t channels = weight.size(2) * numbers_.groups;
  check_weight(weight, smaller, channels, smaller.size(1));
  std::vector<int64_t> shape{smaller.size(0), channels}, behind{smaller.size(0)};
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  behind.insert(behind.end(), sizes.begin(), sizes.end());
  behind.push_back(channels);
  const CopiedWindow found = window(shape, smaller.sizes());
  const auto own_bias = checked_bias(bias, smaller, {weight.size(0), channels});
  const at::Tensor small = channels_behind(smaller), own = weight.contiguous();
  at::Tensor out = recycled(behind, smaller.options());
  FASTVAE_DISPATCH(smaller, {
    const CopiedConvolution<scalar_t> args{out.mutable_data_ptr<scalar_t>(),
                                           const_cast<scalar_t*>(small.const_data_ptr<scalar_t>()),
                                           const_cast<scalar_t*>(own.const_data_ptr<scalar_t>()),
                                           data_or_null_of<scalar_t>(own_bias),
                                           smaller.size(0) / weight.size(0),
                                           found};
    FASTVAE_LAUNCH_CPU(copied_convolution_big, args, weight.size(0), kGrain);
  });
  return channels_second(out);
}

at::Tensor CopiedConvolutionRules::weight(const at::Tensor& larger, const at::Tensor& smaller, int64_t samples) const {
  const EntryGuard guard(kOp, larger);
  check_images("larger", larger, dims_);
  check_like(kOp, "smaller", smaller, larger, "larger");
  check_images("smaller", smaller, dims_);
  FASTVAE_CHECK_VALUE(samples > 0 && larger.size(0) % samples == 0, kOp, "samples",
                      c10::str("a divisor of ", larger.size(0), " rows"), samples);
  FASTVAE_CHECK_VALUE(smaller.size(0) == larger.size(0), kOp, "smaller", c10::str(larger.size(0), " rows as larger"),
                      describe(smaller));
  const CopiedWindow found = window(larger.sizes(), smaller.sizes());
  const at::Tensor big = channels_behind(larger), small = channels_behind(smaller);
  at::Tensor out = recycled({samples, found.taps(), found.channels / found.groups, found.filters}, larger.options());
  FASTVAE_DISPATCH(larger, {
    const CopiedConvolution<scalar_t> args{const_cast<scalar_t*>(big.const_data_ptr<scalar_t>()),
                                           const_cast<scalar_t*>(small.const_data_ptr<scalar_t>()),
                                           out.mutable_data_ptr<scalar_t>(),
                                           nullptr,
                                           larger.size(0) / samples,
                                           found};
    FASTVAE_LAUNCH_CPU(copied_convolution_weight, args, samples, kGrain);
  });
  return out;
}

}  // namespace fastvae
