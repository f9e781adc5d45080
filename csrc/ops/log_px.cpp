// log p(x | z) of several codes z for each x, forward only: what importance sampling asks of a decoder.
//
// FLOPs: one pass over the weights for each code. Tiles of codes keep the activations in a core's caches; x is shared
// by the codes of a sample and never copied for them (but for a tile of more codes than there are samples).

#include <algorithm>
#include <optional>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/operator.h"
#include "../network/network.h"
#include "element_heads.h"

namespace fastvae {
namespace {

// Bytes of the widest stage's activations in a tile, and codes beyond which a tile gains nothing. On a CPU a tile has
// at least as many as the weights, which each tile reads, up to what a shared cache holds.
constexpr int64_t kTileBytesOnCpu = int64_t{2} << 20;
constexpr int64_t kMostTileBytesOnCpu = int64_t{16} << 20;
constexpr int64_t kTileBytesOnCuda = int64_t{256} << 20;
constexpr int64_t kTileRows = 4096;

int64_t tile_rows(const std::vector<at::Tensor>& room_of_one, at::TensorList parameters, bool cuda) {
  int64_t widest = 1, weights = 0;
  for (const at::Tensor& part : room_of_one) {
    widest = std::max<int64_t>(widest, part.nbytes());
  }
  for (const at::Tensor& parameter : parameters) {
    weights += static_cast<int64_t>(parameter.nbytes());
  }
  const int64_t tile = cuda ? kTileBytesOnCuda : std::clamp(weights, kTileBytesOnCpu, kMostTileBytesOnCpu);
  return std::clamp<int64_t>(tile / widest, 1, kTileRows);
}

// The same for a likelihood of elements, behind the network's outputs.
class ElementTiles {
 public:
  ElementTiles(const Network& network, const ElementLikelihood& likelihood, const at::Tensor& x)
      : network_(network),
        likelihood_(likelihood),
        positions_(network.program().output().positions()),
        channels_(network.program().output().channels / likelihood.outputs),
        x_(x.reshape({-1, channels_, positions_}).transpose(1, 2).contiguous()) {}

  // x in the order in which outputs come.
  const at::Tensor& x() const { return x_; }
  int64_t forward_numel() const { return network_.program().forward_numel(); }

  void log_prob(const at::Tensor& z, const at::Tensor& x, const at::Tensor& room, const at::Tensor& out) const {
    const int64_t rows = z.size(0);
    const Tape tape = network_.forward_tape(room.narrow(0, 0, rows * forward_numel()), rows);
    const at::Tensor y = network_.with_bias(network_.forward(z, tape))
                             .view({rows, positions_, likelihood_.outputs, channels_})
                             .transpose(1, 2)
                             .contiguous();
    element_terms(likelihood_, y, x, {}, {}, out);
  }

 private:
  const Network& network_;
  ElementLikelihood likelihood_;
  int64_t positions_, channels_;
  at::Tensor x_;
};

// [S, B], for z [S, B, d] and x [B, elements].
at::Tensor log_px(const at::Tensor& z_in, const at::Tensor& x_in, at::TensorList parameters,
                  std::string_view network_text, std::string_view likelihood_text) {
  constexpr const char* op = "log_px";
  const EntryGuard guard(op, z_in);
  check_floating(op, "z", z_in);
  FASTVAE_CHECK_VALUE(z_in.dim() == 3 && z_in.size(2) > 0, op, "z", "shape [S, B, d] with d > 0", describe(z_in));
  const int64_t draws = z_in.size(0), samples = z_in.size(1), dim = z_in.size(2);
  std::optional<ElementLikelihood> elements = find_element_likelihood(op, likelihood_text);
  if (elements.has_value() && elements->is_head) {
    elements.reset();  // in the last layer's own pass
  }
  // A network under no likelihood of its own ends as an encoder does.
  const LikelihoodSpec likelihood = elements.has_value() ? encoder_head() : parse_likelihood(op, likelihood_text);
  const std::shared_ptr<const Program> program =
      find_program(op, network_text, parameters, dim, likelihood, Norms::kFolded);
  const Network network(op, *program, likelihood, parameters, z_in);
  const int64_t outputs = elements.has_value() ? elements->outputs : 1;
  FASTVAE_CHECK_VALUE(program->output().channels % outputs == 0, op, "network",
                      c10::str("output channels divisible by ", outputs, ", an element's outputs"),
                      program->output().channels);
  check_like(op, "x", x_in, z_in, "z");
  check_sizes(op, "x", x_in, {samples, observed_numel(op, *program, likelihood) / outputs});
  const at::Tensor log_prob = aten::empty({draws, samples}, z_in.options());
  if (log_prob.numel() == 0) {
    return log_prob;
  }
  const at::Tensor dense = z_in.contiguous();
  const at::Tensor z = dense.view({draws * samples, dim}), flat = log_prob.view({-1});
  const int64_t limit = tile_rows(network.make_forward_room(1), parameters, runs_cuda(z));
  // A tile is a part of one draw of all samples, or several draws of them.
  const int64_t together = std::clamp<int64_t>(limit / samples, 1, draws);
  const int64_t tile = std::min(limit, together * samples);
  const auto for_each_tile = [&](const at::Tensor& observed, const auto& run) {
    const at::Tensor x = observed.view({samples, -1}).repeat({together, 1});
    for (int64_t draw = 0; draw < draws; draw += together) {
      const int64_t rows = std::min(together, draws - draw) * samples;
      for (int64_t first = 0; first < rows; first += tile) {
        const int64_t start = draw * samples + first, count = std::min(tile, rows - first);
        run(z.narrow(0, start, count), x.narrow(0, first, count), flat.narrow(0, start, count));
      }
    }
  };
  if (elements.has_value()) {
    const ElementTiles tiles(network, *elements, x_in);
    const at::Tensor room = aten::empty({tile * tiles.forward_numel()}, z.options());
    for_each_tile(tiles.x(), [&](const at::Tensor& codes, const at::Tensor& x, const at::Tensor& out) {
      tiles.log_prob(codes, x, room, out);
    });
    return log_prob;
  }
  const std::vector<at::Tensor> room = network.make_forward_room(tile);
  for_each_tile(network.observed_to_rows(x_in),
                [&](const at::Tensor& codes, const at::Tensor& x, const at::Tensor& out) {
                  network.forward_log_prob(codes, x, room, out);
                });
  return log_prob;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_operator<&log_px>(m, "log_px(Tensor z, Tensor x, Tensor[] parameters, str network, str likelihood) -> Tensor",
                           refuses_gradient("fastvae::log_px: forward only, it has no gradient; differentiate "
                                            "likelihood.log_prob(decoder(z), x) instead"));
}

}  // namespace fastvae
