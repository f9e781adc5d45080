// The forward sweep of a network to log p(x | z), with nothing kept for another sweep.

#include "../common/aten.h"
#include "conv_transpose.h"
#include "network.h"

namespace fastvae {
namespace {

bool hands_over(const Stage& last, const at::Tensor& weight) {
  return weight.defined() && conv_transpose_route(last, weight) == ConvTransposeRoute::kDirect;
}

}  // namespace

std::vector<at::Tensor> Network::make_forward_room(int64_t samples) const {
  std::vector<at::Tensor> room;
  for (size_t l = 0; l < depth(); ++l) {
    const bool stored = l + 1 < depth() || !hands_over(program_.stages[l], weight_[l]);
    room.push_back(aten::empty({stored ? samples * program_.stages[l].out.numel() : 0}, options_));
  }
  return room;
}

void Network::forward_log_prob(const at::Tensor& z, const at::Tensor& x, const std::vector<at::Tensor>& room,
                               const at::Tensor& log_prob) const {
  at::Tensor in = z.view({-1});
  const int64_t samples = z.size(0);
  const auto place = [&](size_t l) { return room[l].narrow(0, 0, samples * program_.stages[l].out.numel()); };
  for (size_t l = 0; l + 1 < depth(); ++l) {
    const at::Tensor h = place(l);
    forward_stage(l, in, h, {});
    in = h;
  }
  const size_t last = depth() - 1;
  if (hands_over(program_.stages[last], weight_[last])) {
    conv_transpose_log_prob(program_.stages[last], weight_[last], bias_[last], in, x, likelihood_, log_prob);
  } else {
    head(apply(last, in, place(last)), x, {}, log_prob);
  }
}

}  // namespace fastvae
