#include "conv_transpose.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../common/launch.h"

namespace fastvae {
namespace {

// Bytes of columns worked on at a time: they are written and read once each, and should not leave the caches between.
constexpr int64_t kTileBytes = int64_t{1} << 20;

ConvolutionWindow window_of(const Stage& stage, int64_t kernel_height, int64_t kernel_width) {
  return {stage.out.channels, stage.in.height,   stage.in.width,   stage.out.height, stage.out.width,
          kernel_height,      kernel_width,      stage.stride[0],  stage.stride[1],  stage.padding[0],
          stage.padding[1],   stage.dilation[0], stage.dilation[1]};
}

ConvolutionWindow window_of(const Stage& stage, const at::Tensor& packed) {
  return window_of(stage, packed.size(1), packed.size(2));
}

// Calls body(first, count, rows, columns) for tiles of samples, with room for their columns [rows, kh kw C_out].
template <typename Body>
void for_each_tile(const Stage& stage, const at::Tensor& packed, const at::Tensor& like, int64_t samples,
                   const Body& body) {
  const int64_t width = packed.numel() / packed.size(0);
  const int64_t positions = stage.in.positions();
  const int64_t tile = std::clamp<int64_t>(kTileBytes / (positions * width * like.element_size()), 1, samples);
  const at::Tensor columns = at::empty({tile * positions, width}, like.options());
  for (int64_t first = 0; first < samples; first += tile) {
    const int64_t count = std::min(tile, samples - first);
    at::Tensor part = columns.narrow(0, 0, count * positions);
    body(first, count, part);
  }
}

at::Tensor rows_of_samples(const at::Tensor& flat, const SampleShape& shape, int64_t first, int64_t count) {
  return flat.view({-1, shape.channels}).narrow(0, first * shape.positions(), count * shape.positions());
}

void unfold_tile(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta, int64_t first, int64_t count,
                 const at::Tensor& columns) {
  FASTVAE_DISPATCH(delta, {
    const Unfold<scalar_t> args{delta.const_data_ptr<scalar_t>() + first * stage.out.numel(),
                                columns.mutable_data_ptr<scalar_t>(), window_of(stage, packed)};
    FASTVAE_LAUNCH_CPU(unfold, args, count, columns.numel() / count);
  });
}

}  // namespace

ConvTransposeRoute conv_transpose_route(const Stage& stage, const at::Tensor& weight) {
  if (stage.affine != Affine::kConvTranspose2d || !weight.is_cpu() || stage.groups != 1) {
    return ConvTransposeRoute::kLibrary;
  }
  if (stage.out.channels <= 3) {
    return ConvTransposeRoute::kNarrow;
  }
  return stage.out.channels >= 8 ? ConvTransposeRoute::kFolded : ConvTransposeRoute::kLibrary;
}

at::Tensor conv_transpose_pack(const at::Tensor& weight) { return weight.permute({0, 2, 3, 1}).contiguous(); }

void narrow_conv_transpose(const Stage& stage, const at::Tensor& weight, const at::Tensor& in, const at::Tensor& out) {
  const int64_t samples = in.numel() / stage.in.numel();
  FASTVAE_DISPATCH(in, {
    const NarrowConvTranspose<scalar_t> args{in.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(),
                                             out.mutable_data_ptr<scalar_t>(), stage.in.channels,
                                             window_of(stage, weight.size(2), weight.size(3))};
    FASTVAE_LAUNCH_CPU(narrow_conv_transpose, args, samples, stage.in.numel() * stage.out.channels);
  });
}

void folded_conv_transpose(const Stage& stage, const at::Tensor& packed, const at::Tensor& in, const at::Tensor& out) {
  const at::Tensor matrix = packed.view({packed.size(0), -1});
  for_each_tile(stage, packed, in, in.numel() / stage.in.numel(),
                [&](int64_t first, int64_t count, at::Tensor& columns) {
                  at::mm_out(columns, rows_of_samples(in, stage.in, first, count), matrix);
                  FASTVAE_DISPATCH(in, {
                    const Fold<scalar_t> args{columns.const_data_ptr<scalar_t>(),
                                              out.mutable_data_ptr<scalar_t>() + first * stage.out.numel(),
                                              window_of(stage, packed)};
                    FASTVAE_LAUNCH_CPU(fold, args, count, columns.numel() / count);
                  });
                });
}

void folded_conv_transpose_reverse(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                                   const at::Tensor& out) {
  const at::Tensor matrix = packed.view({packed.size(0), -1}).t();
  for_each_tile(stage, packed, delta, delta.numel() / stage.out.numel(),
                [&](int64_t first, int64_t count, at::Tensor& columns) {
                  unfold_tile(stage, packed, delta, first, count, columns);
                  at::Tensor rows = rows_of_samples(out, stage.in, first, count);
                  at::mm_out(rows, columns, matrix);
                });
}

void folded_conv_transpose_add_weight_gradient(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                                               const at::Tensor& h, at::Tensor& gradient) {
  at::Tensor sum = at::zeros({packed.size(0), packed.numel() / packed.size(0)}, packed.options());
  for_each_tile(stage, packed, delta, delta.numel() / stage.out.numel(),
                [&](int64_t first, int64_t count, at::Tensor& columns) {
                  unfold_tile(stage, packed, delta, first, count, columns);
                  sum.addmm_(rows_of_samples(h, stage.in, first, count).t(), columns);
                });
  gradient.add_(sum.view(packed.sizes()).permute({0, 3, 1, 2}));
}

}  // namespace fastvae
