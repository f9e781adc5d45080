#include "conv_transpose.h"

#include <algorithm>

#include "../common/aten.h"
#include "../common/launch.h"
#include "../common/product.h"

namespace fastvae {
namespace {

// Bytes of columns worked on at a time: they are written and read once each, and should not leave a CPU's caches
// between; a GPU wants few launches, and its users their memory.
constexpr int64_t kTileBytesOnCpu = int64_t{1} << 20;
constexpr int64_t kTileBytesOnCuda = int64_t{64} << 20;
// Rows of a product from which on it is worth reading a weight that fits into no cache.
constexpr int64_t kTileRows = 256;
// Output channels up to which the narrow kernel wins, and from which on a row of them fills vectors.
constexpr int64_t kNarrowChannels = 3;
constexpr int64_t kWideChannels = 8;
// Our kernels walk over all phases of a stride, also those that no output has.
constexpr int64_t kMostPhases = 64;

ConvolutionWindow window_of(const Stage& stage, const at::Tensor& packed) {
  return {stage.out.channels, stage.in.height,   stage.in.width,   stage.out.height, stage.out.width,
          packed.size(1),     packed.size(2),    stage.stride[0],  stage.stride[1],  stage.padding[0],
          stage.padding[1],   stage.dilation[0], stage.dilation[1]};
}

// Calls body(first, count, rows, columns) for tiles of samples, with room for their columns [rows, kh kw C_out].
template <typename Body>
void for_each_tile(const Stage& stage, const at::Tensor& packed, const at::Tensor& like, int64_t samples,
                   const Body& body) {
  const int64_t width = packed.numel() / packed.size(0);
  const int64_t positions = stage.in.positions();
  const int64_t bytes = runs_cuda(like) ? kTileBytesOnCuda : kTileBytesOnCpu;
  const int64_t fitting = bytes / (positions * width * like.element_size());
  const int64_t amortising = (kTileRows + positions - 1) / positions;
  const int64_t tile = std::clamp<int64_t>(std::max(fitting, amortising), 1, samples);
  const at::Tensor columns = aten::empty({tile * positions, width}, like.options());
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
                                columns.mutable_data_ptr<scalar_t>(), window_of(stage, packed), count};
    FASTVAE_LAUNCH(unfold, delta.device(), args, count, columns.numel() / count);
  });
}

void folded_conv_transpose(const Stage& stage, const at::Tensor& packed, const at::Tensor& in, const at::Tensor& out) {
  const at::Tensor matrix = packed.view({packed.size(0), -1});
  for_each_tile(stage, packed, in, in.numel() / stage.in.numel(),
                [&](int64_t first, int64_t count, at::Tensor& columns) {
                  multiply(columns, rows_of_samples(in, stage.in, first, count), matrix);
                  FASTVAE_DISPATCH(in, {
                    const Fold<scalar_t> args{columns.const_data_ptr<scalar_t>(),
                                              out.mutable_data_ptr<scalar_t>() + first * stage.out.numel(),
                                              window_of(stage, packed), count};
                    FASTVAE_LAUNCH(fold, in.device(), args, count, columns.numel() / count);
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
                  multiply(rows, columns, matrix);
                });
}

void folded_conv_transpose_add_weight_gradient(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                                               const at::Tensor& h, at::Tensor& gradient) {
  at::Tensor sum = aten::zeros({packed.size(0), packed.numel() / packed.size(0)}, packed.options());
  for_each_tile(stage, packed, delta, delta.numel() / stage.out.numel(),
                [&](int64_t first, int64_t count, at::Tensor& columns) {
                  unfold_tile(stage, packed, delta, first, count, columns);
                  add_product(sum, rows_of_samples(h, stage.in, first, count).t(), columns);
                });
  gradient.add_(sum.view(packed.sizes()).permute({0, 3, 1, 2}));
}

void direct_conv_transpose(const Stage& stage, const at::Tensor& packed, const at::Tensor& in, const at::Tensor& out,
                           bool narrow) {
  const int64_t samples = in.numel() / stage.in.numel();
  FASTVAE_DISPATCH(in, {
    const scalar_t* weight = packed.const_data_ptr<scalar_t>();
    const scalar_t* from = in.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    if (narrow) {
      const NarrowConvTranspose<scalar_t> args{from, weight, to, stage.in.channels, window_of(stage, packed)};
      FASTVAE_LAUNCH_CPU(narrow_conv_transpose, args, samples, stage.in.numel() * stage.out.channels);
    } else {
      const DirectConvTranspose<scalar_t> args{from, weight, to, stage.in.channels, window_of(stage, packed)};
      FASTVAE_LAUNCH_CPU(direct_conv_transpose, args, samples, stage.in.numel() * stage.out.channels);
    }
  });
}

void direct_conv_transpose_reverse(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                                   const at::Tensor& out) {
  const int64_t samples = delta.numel() / stage.out.numel();
  const at::Tensor weight = packed[1];
  FASTVAE_DISPATCH(delta, {
    const DirectConvTransposeReverse<scalar_t> args{delta.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(),
                                                    out.mutable_data_ptr<scalar_t>(), stage.in.channels,
                                                    window_of(stage, packed)};
    FASTVAE_LAUNCH_CPU(direct_conv_transpose_reverse, args, samples, stage.in.numel() * stage.out.channels);
  });
}

void direct_conv_transpose_add_weight_gradient(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                                               const at::Tensor& h, at::Tensor& gradient) {
  const int64_t samples = delta.numel() / stage.out.numel();
  const int64_t tasks = std::clamp<int64_t>(at::get_num_threads(), 1, samples);
  const at::Tensor partial =
      aten::empty({tasks, packed.size(1), packed.size(2), stage.out.channels, stage.in.channels}, packed.options());
  FASTVAE_DISPATCH(delta, {
    const DirectConvTransposeGradient<scalar_t> args{delta.const_data_ptr<scalar_t>(),
                                                     h.const_data_ptr<scalar_t>(),
                                                     partial.mutable_data_ptr<scalar_t>(),
                                                     stage.in.channels,
                                                     samples,
                                                     tasks,
                                                     window_of(stage, packed)};
    FASTVAE_LAUNCH_CPU(direct_conv_transpose_gradient, args, tasks, samples * stage.in.numel() * stage.out.channels);
  });
  gradient.add_(partial.sum(0).permute({3, 2, 0, 1}));
}

}  // namespace

namespace {

// Of the weight itself, which may be packed.
int64_t weight_bytes(const Stage& stage, const at::Tensor& weight) {
  return stage.weight_numel() * weight.element_size();
}

// Whether GEMM and fold are quicker than windows, by what a FLOP costs (ns, float32, both cores of a Zen 3 [measured]).
// Windows read the weight once for each row of outputs, 2 / width bytes a FLOP, which are free as long as the L2 cache
// holds it; fold moves a column for every 2 C_in FLOPs. Doubles take twice as long in all of that.
bool is_folding_quicker(const Stage& stage, const at::Tensor& weight) {
  constexpr int64_t kCacheBytes = int64_t{1} << 19;
  const double direct = 0.0118 + 0.04 / static_cast<double>(stage.in.width);
  const double folded = 0.0087 + 0.6 / static_cast<double>(stage.in.channels);
  return weight_bytes(stage, weight) > kCacheBytes && folded < direct;
}

// Whether oneDNN's blocks are quicker than both: where neither the weight nor the columns of a sample fit into a cache,
// so that products stream them [Zen 4: 1024 to 512 channels, 8x8 to 16x16, batch 16: 0.8 of the time of GEMM and fold;
// 4x4 to 7x7, where columns fit: 1.2].
bool streams(const Stage& stage, const at::Tensor& weight) {
  constexpr int64_t kWeightBytes = int64_t{2} << 20, kPositions = 64;
  return weight_bytes(stage, weight) > kWeightBytes && stage.in.positions() >= kPositions;
}

}  // namespace

bool is_in_planes(const Stage& stage, const at::Tensor& weight) {
  constexpr int64_t kSamples = 16;
  return !runs_cuda(weight) && stage.weight_numel() > kSamples * (stage.in.numel() + stage.out.numel());
}

ConvTransposeRoute conv_transpose_route(const Stage& stage, const at::Tensor& weight) {
  const int64_t channels = stage.out.channels;
  if (stage.affine != Affine::kConvTranspose2d || stage.groups != 1) {
    return ConvTransposeRoute::kLibrary;
  }
  // cuDNN convolves float32 in channel-last layout at an eighth of the rate of a product [H100].
  if (runs_cuda(weight)) {
    return ConvTransposeRoute::kFolded;
  }
  if (std::max(stage.stride[0], stage.stride[1]) > kMostPhases ||
      (channels > kNarrowChannels && channels < kWideChannels)) {
    return ConvTransposeRoute::kLibrary;
  }
  // A single position meets every tap once: one product, where windows would multiply padding.
  const bool dense = stage.in.positions() == 1;
  const bool dilated = stage.dilation[0] != 1 || stage.dilation[1] != 1;
  if (channels < kWideChannels) {
    return dilated ? ConvTransposeRoute::kLibrary : ConvTransposeRoute::kNarrow;
  }
  if (streams(stage, weight)) {
    return ConvTransposeRoute::kLibrary;
  }
  return dense || dilated || is_folding_quicker(stage, weight) ? ConvTransposeRoute::kFolded
                                                               : ConvTransposeRoute::kDirect;
}

at::Tensor conv_transpose_pack(const Stage& stage, const at::Tensor& weight) {
  switch (conv_transpose_route(stage, weight)) {
    case ConvTransposeRoute::kLibrary:
      // As the images: ATen would otherwise bring the weight into their layout at every call.
      return weight.contiguous(is_in_planes(stage, weight) ? at::MemoryFormat::Contiguous
                                                           : at::MemoryFormat::ChannelsLast);
    case ConvTransposeRoute::kFolded:
      return weight.permute({0, 2, 3, 1}).contiguous();
    default:
      break;
  }
  const int64_t inputs = weight.size(0), outputs = weight.size(1), height = weight.size(2), width = weight.size(3);
  const at::Tensor packed = aten::empty({2, height, width, inputs * outputs}, weight.options());
  packed[1].view({height, width, outputs, inputs}).copy_(weight.permute({2, 3, 1, 0}));
  if (conv_transpose_route(stage, weight) == ConvTransposeRoute::kNarrow) {
    packed[0].view({inputs, height, width, outputs}).copy_(weight.permute({0, 2, 3, 1}));
    return packed;
  }
  const at::Tensor forward = packed[0].view({height, width, inputs, outputs});
  const int64_t stride = stage.stride[1];
  for (int64_t phase = 0, place = 0; phase < stride; ++phase) {
    const int64_t first = (phase + stage.padding[1]) % stride;
    for (int64_t j = first + (width - 1 - first) / stride * stride; first < width && j >= first; j -= stride) {
      forward.select(1, place++).copy_(weight.select(3, j).permute({2, 0, 1}));
    }
  }
  return packed;
}

void conv_transpose(const Stage& stage, const at::Tensor& packed, const at::Tensor& in, const at::Tensor& out) {
  const ConvTransposeRoute route = conv_transpose_route(stage, packed);
  route == ConvTransposeRoute::kFolded
      ? folded_conv_transpose(stage, packed, in, out)
      : direct_conv_transpose(stage, packed, in, out, route == ConvTransposeRoute::kNarrow);
}

void conv_transpose_reverse(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                            const at::Tensor& out) {
  conv_transpose_route(stage, packed) == ConvTransposeRoute::kFolded
      ? folded_conv_transpose_reverse(stage, packed, delta, out)
      : direct_conv_transpose_reverse(stage, packed, delta, out);
}

void conv_transpose_add_weight_gradient(const Stage& stage, const at::Tensor& packed, const at::Tensor& delta,
                                        const at::Tensor& h, at::Tensor& gradient) {
  conv_transpose_route(stage, packed) == ConvTransposeRoute::kFolded
      ? folded_conv_transpose_add_weight_gradient(stage, packed, delta, h, gradient)
      : direct_conv_transpose_add_weight_gradient(stage, packed, delta, h, gradient);
}

void conv_transpose_log_prob(const Stage& stage, const at::Tensor& packed, const at::Tensor& bias, const at::Tensor& in,
                             const at::Tensor& x, const LikelihoodSpec& likelihood, const at::Tensor& log_prob) {
  const int64_t samples = in.numel() / stage.in.numel();
  FASTVAE_DISPATCH(in, {
    const ConvTransposeLogProb<scalar_t> args{{in.const_data_ptr<scalar_t>(), packed.const_data_ptr<scalar_t>(),
                                               nullptr, stage.in.channels, window_of(stage, packed)},
                                              data_or_null<scalar_t>(bias),
                                              x.const_data_ptr<scalar_t>(),
                                              log_prob.mutable_data_ptr<scalar_t>(),
                                              likelihood};
    FASTVAE_LAUNCH_CPU(conv_transpose_log_prob, args, samples, stage.in.numel() * stage.out.channels);
  });
}

}  // namespace fastvae
