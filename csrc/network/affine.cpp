#include "affine.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>

#include <utility>

#include "../common/aten.h"
#include "../common/product.h"
#include "../common/recycling.h"
#include "conv_transpose.h"

namespace fastvae {
namespace {

// Channel-last storage as the [B, C, H, W] tensor that ATen's convolutions expect: a view or, where oneDNN is quicker
// with planes, a copy.
at::Tensor as_image(const at::Tensor& rows, const SampleShape& shape, bool in_planes) {
  const at::Tensor image = rows.view({-1, shape.height, shape.width, shape.channels}).permute({0, 3, 1, 2});
  return in_planes ? image.contiguous() : image;
}

at::Tensor as_rows(const at::Tensor& image) {
  const at::Tensor last = image.permute({0, 2, 3, 1}).contiguous();
  return last.view({-1});
}

bool is_convolution(const Stage& stage) {
  return stage.affine == Affine::kConv2d || stage.affine == Affine::kConvTranspose2d;
}

// The transposed convolution whose transpose a convolution is; their weights have the same layout.
Stage mirrored(const Stage& stage) {
  Stage mirror = stage;
  mirror.affine = Affine::kConvTranspose2d;
  std::swap(mirror.in, mirror.out);
  return mirror;
}

// A convolution as the transposed one that stands for it; a transposed one is itself.
Stage as_transposed(const Stage& stage) { return stage.affine == Affine::kConv2d ? mirrored(stage) : stage; }

// Whether the kernels for transposed convolutions take a convolution in their stead.
bool is_mirrored(const Stage& stage, const at::Tensor& weight) {
  return stage.affine == Affine::kConv2d &&
         conv_transpose_route(mirrored(stage), weight) != ConvTransposeRoute::kLibrary;
}

at::Tensor convolve(const Stage& stage, const at::Tensor& weight, const at::Tensor& in) {
  const at::Tensor image = as_image(in, stage.in, is_in_planes(stage, weight));
  return as_rows(at::convolution(image, weight, /*bias=*/{}, stage.stride, stage.padding, stage.dilation,
                                 stage.affine == Affine::kConvTranspose2d, stage.output_padding, stage.groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolve_backward(const Stage& stage, const at::Tensor& weight,
                                                                 const at::Tensor& delta, const at::Tensor& in,
                                                                 std::array<bool, 3> mask) {
  const bool in_planes = is_in_planes(stage, weight);
  // Where no weight's gradient needs the input, its sizes and layout alone are read.
  const at::Tensor image = in_planes && !mask[1] ? in.view({-1, stage.in.channels, stage.in.height, stage.in.width})
                                                 : as_image(in, stage.in, in_planes);
  return at::convolution_backward(as_image(delta, stage.out, in_planes), image, weight, /*bias_sizes=*/c10::nullopt,
                                  stage.stride, stage.padding, stage.dilation, stage.affine == Affine::kConvTranspose2d,
                                  stage.output_padding, stage.groups, mask);
}

at::Tensor transpose_blocks(const at::Tensor& in, const at::Tensor& out, int64_t rows, int64_t columns) {
  out.view({-1, columns, rows}).copy_(in.view({-1, rows, columns}).transpose(1, 2));
  return out;
}

}  // namespace

at::Tensor affine_pack(const Stage& stage, const at::Tensor& weight) {
  if (is_convolution(stage)) {
    return conv_transpose_pack(as_transposed(stage), weight);
  }
  return weight.contiguous();
}

at::Tensor affine_apply(const Stage& stage, const at::Tensor& weight, const at::Tensor& in, const at::Tensor& out) {
  switch (stage.affine) {
    case Affine::kIdentity:
      return in;
    case Affine::kLinear: {
      at::Tensor result = out.view({-1, stage.out.channels});
      multiply(result, in.view({-1, stage.in.channels}), weight.t());
      return out;
    }
    case Affine::kBatchNorm: {
      at::Tensor result = out.view({-1, stage.out.channels});
      aten::mul_out(result, in.view({-1, stage.in.channels}), weight);
      return out;
    }
    case Affine::kToFlat:
      return transpose_blocks(in, out, stage.in.positions(), stage.in.channels);
    case Affine::kToImage:
      return transpose_blocks(in, out, stage.out.channels, stage.out.positions());
    default:
      if (conv_transpose_route(stage, weight) != ConvTransposeRoute::kLibrary) {
        conv_transpose(stage, weight, in, out);
        return out;
      }
      if (is_mirrored(stage, weight)) {
        conv_transpose_reverse(mirrored(stage), weight, in, out);
        return out;
      }
      return convolve(stage, weight, in);
  }
}

at::Tensor affine_transpose(const Stage& stage, const at::Tensor& weight, const at::Tensor& delta,
                            const at::Tensor& out) {
  switch (stage.affine) {
    case Affine::kIdentity:
      return delta;
    case Affine::kLinear: {
      at::Tensor result = out.view({-1, stage.in.channels});
      multiply(result, delta.view({-1, stage.out.channels}), weight);
      return out;
    }
    case Affine::kBatchNorm: {
      at::Tensor result = out.view({-1, stage.in.channels});
      aten::mul_out(result, delta.view({-1, stage.out.channels}), weight);
      return out;
    }
    case Affine::kToFlat:
      return transpose_blocks(delta, out, stage.in.channels, stage.in.positions());
    case Affine::kToImage:
      return transpose_blocks(delta, out, stage.out.positions(), stage.out.channels);
    default: {
      if (conv_transpose_route(stage, weight) != ConvTransposeRoute::kLibrary) {
        conv_transpose_reverse(stage, weight, delta, out);
        return out;
      }
      if (is_mirrored(stage, weight)) {
        conv_transpose(mirrored(stage), weight, delta, out);
        return out;
      }
      // `out` stands in for the layer's input.
      return as_rows(std::get<0>(convolve_backward(stage, weight, delta, out, {true, false, false})));
    }
  }
}

bool affine_in_blocks(const Stage& stage, const at::Tensor& weight) {
  if (!is_convolution(stage)) {
    return false;
  }
  const ConvTransposeRoute route = conv_transpose_route(as_transposed(stage), weight);
  return route == ConvTransposeRoute::kDirect || route == ConvTransposeRoute::kNarrow;
}

void affine_add_weight_gradient(const Stage& stage, const at::Tensor& weight, const at::Tensor& delta,
                                const at::Tensor& h, at::Tensor& gradient) {
  if (stage.affine == Affine::kLinear) {
    add_product(gradient, delta.view({-1, stage.out.channels}).t(), h.view({-1, stage.in.channels}));
  } else if (conv_transpose_route(stage, weight) != ConvTransposeRoute::kLibrary) {
    conv_transpose_add_weight_gradient(stage, weight, delta, h, gradient);
  } else if (is_mirrored(stage, weight)) {
    conv_transpose_add_weight_gradient(mirrored(stage), weight, h, delta, gradient);
  } else if (is_convolution(stage)) {
    gradient.add_(std::get<1>(convolve_backward(stage, weight, delta, h, {false, true, false})));
  }
}

at::Tensor affine_weight_gradient(const Stage& stage, const at::Tensor& weight, const at::Tensor& delta,
                                  const at::Tensor& h, at::IntArrayRef sizes) {
  if (stage.affine == Affine::kLinear) {
    return multiply(reused(sizes, weight.options()), delta.view({-1, stage.out.channels}).t(),
                    h.view({-1, stage.in.channels}));
  }
  if (is_convolution(stage) && conv_transpose_route(stage, weight) == ConvTransposeRoute::kLibrary &&
      !is_mirrored(stage, weight)) {
    return std::get<1>(convolve_backward(stage, weight, delta, h, {false, true, false}));
  }
  at::Tensor gradient = reused(sizes, weight.options()).zero_();
  affine_add_weight_gradient(stage, weight, delta, h, gradient);
  return gradient;
}

}  // namespace fastvae
