// grad_dot: dot products of per-sample gradients of affine layers, without the gradients (design: "Per-sample gradient
// dot products"). For a layer whose sample i met inputs h_it and output gradients delta_it, t = 1..T,
//
//   <dA_i, dA_j> + <db_i, db_j> = sum_{t,t'} (h_it . h_jt' + 1) (delta_it . delta_jt')      (without a bias: + 0)
//
// summed over the layers of the call. The two Gram matrices are formed in tiles that stay in cache, and multiplied
// there.

#include <algorithm>

#include "../common/aten.h"
#include "../common/guard.h"
#include "../common/launch.h"
#include "../common/operator.h"
#include "../common/product.h"

namespace fastvae {
namespace {

// Rows and columns of a Gram tile: two tiles of float32 take 512 KB of a core's L2 and a product has enough depth for
// GEMM; on a GPU they take 32 MB of its L2, and a product has a tile for each multiprocessor.
constexpr int64_t kTileRowsOnCpu = 256, kTileRowsOnCuda = 2048;

int64_t tile_rows(const at::Tensor& tensor) { return runs_cuda(tensor) ? kTileRowsOnCuda : kTileRowsOnCpu; }

// One layer as the sums see it: [samples, terms, features].
struct Layer {
  at::Tensor inputs_a, grads_a, inputs_b, grads_b;
  bool bias;

  int64_t terms_a() const { return inputs_a.size(1); }
  int64_t terms_b() const { return inputs_b.size(1); }
};

at::Tensor as_terms(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return dense.dim() == 2 ? dense.view({dense.size(0), 1, dense.size(1)}) : dense;
}

at::Tensor as_rows(const at::Tensor& terms) { return terms.view({terms.size(0) * terms.size(1), terms.size(2)}); }

void check_lists(const char* op, at::TensorList inputs_a, at::TensorList grads_a, at::TensorList inputs_b,
                 at::TensorList grads_b, at::IntArrayRef bias) {
  FASTVAE_CHECK_VALUE(!inputs_a.empty(), op, "inputs_a", "at least one layer", "none");
  const auto same = [&](const char* name, size_t count) {
    FASTVAE_CHECK_VALUE(count == inputs_a.size(), op, name, c10::str(inputs_a.size(), " layers as inputs_a"), count);
  };
  same("output_grads_a", grads_a.size());
  same("inputs_b", inputs_b.size());
  same("output_grads_b", grads_b.size());
  same("bias", bias.size());
}

std::vector<Layer> check_layers(const char* op, at::TensorList inputs_a, at::TensorList grads_a,
                                at::TensorList inputs_b, at::TensorList grads_b, at::IntArrayRef bias) {
  check_lists(op, inputs_a, grads_a, inputs_b, grads_b, bias);
  const at::Tensor& first = inputs_a[0];
  check_floating(op, "inputs_a", first);
  const auto check_terms = [&](const char* name, const at::Tensor& tensor) {
    check_like(op, name, tensor, first, "inputs_a");
    FASTVAE_CHECK_VALUE(tensor.dim() == 2 || tensor.dim() == 3, op, name, "shape [N, features] or [N, T, features]",
                        describe(tensor));
  };
  const auto check_pair = [&](const char* name, const at::Tensor& grads, const char* of, const at::Tensor& inputs) {
    FASTVAE_CHECK_VALUE(grads.dim() == inputs.dim() &&
                            grads.sizes().slice(0, grads.dim() - 1) == inputs.sizes().slice(0, inputs.dim() - 1),
                        op, name, c10::str("samples and terms as ", of, " of ", inputs.sizes()), describe(grads));
  };
  std::vector<Layer> layers;
  for (size_t l = 0; l < inputs_a.size(); ++l) {
    check_terms("inputs_a", inputs_a[l]);
    check_terms("output_grads_a", grads_a[l]);
    check_terms("inputs_b", inputs_b[l]);
    check_terms("output_grads_b", grads_b[l]);
    check_pair("output_grads_a", grads_a[l], "inputs_a", inputs_a[l]);
    check_pair("output_grads_b", grads_b[l], "inputs_b", inputs_b[l]);
    const auto check_width = [&](const char* name, const at::Tensor& b, const at::Tensor& a) {
      FASTVAE_CHECK_VALUE(a.size(-1) == b.size(-1), op, name, c10::str(a.size(-1), " features"), describe(b));
    };
    check_width("inputs_b", inputs_b[l], inputs_a[l]);
    check_width("output_grads_b", grads_b[l], grads_a[l]);
    const auto check_samples = [&](const char* name, const at::Tensor& tensor, int64_t samples) {
      FASTVAE_CHECK_VALUE(tensor.size(0) == samples, op, name, c10::str(samples, " samples in every layer"),
                          describe(tensor));
    };
    check_samples("inputs_a", inputs_a[l], inputs_a[0].size(0));
    check_samples("inputs_b", inputs_b[l], inputs_b[0].size(0));
    layers.push_back(
        {as_terms(inputs_a[l]), as_terms(grads_a[l]), as_terms(inputs_b[l]), as_terms(grads_b[l]), bias[l] != 0});
  }
  return layers;
}

// Adds a layer's part to out[first_a : first_a + count_a, first_b : first_b + count_b], or writes it if `first`.
void add_tile(const Layer& layer, int64_t first_a, int64_t count_a, int64_t first_b, int64_t count_b, bool first,
              const at::Tensor& gram, const at::Tensor& out) {
  const int64_t t = layer.terms_a(), u = layer.terms_b(), most = tile_rows(out);
  // More terms than a tile has rows are summed part by part.
  const int64_t step_t = std::min(t, most), step_u = std::min(u, most);
  const auto part = [&](const at::Tensor& rows, int64_t sample, int64_t terms, int64_t term, int64_t samples,
                        int64_t length) { return as_rows(rows).narrow(0, sample * terms + term, samples * length); };
  for (int64_t ta = 0; ta < t; ta += step_t) {
    const int64_t length_a = std::min(step_t, t - ta), rows_a = count_a * length_a;
    for (int64_t tb = 0; tb < u; tb += step_u) {
      const int64_t length_b = std::min(step_u, u - tb), rows_b = count_b * length_b;
      at::Tensor of_inputs = gram.narrow(0, 0, rows_a * rows_b).view({rows_a, rows_b});
      at::Tensor of_grads = gram.narrow(0, gram.numel() / 2, rows_a * rows_b).view({rows_a, rows_b});
      multiply(of_inputs, part(layer.inputs_a, first_a, t, ta, count_a, length_a),
               part(layer.inputs_b, first_b, u, tb, count_b, length_b).t());
      multiply(of_grads, part(layer.grads_a, first_a, t, ta, count_a, length_a),
               part(layer.grads_b, first_b, u, tb, count_b, length_b).t());
      FASTVAE_DISPATCH(out, {
        const GramProduct<scalar_t> args{of_inputs.const_data_ptr<scalar_t>(),
                                         of_grads.const_data_ptr<scalar_t>(),
                                         out.mutable_data_ptr<scalar_t>() + first_a * out.size(1) + first_b,
                                         out.size(1),
                                         count_a,
                                         length_a,
                                         count_b,
                                         length_b,
                                         layer.bias,
                                         !first || ta > 0 || tb > 0};
        FASTVAE_LAUNCH(gram_product, out.device(), args, count_a, length_a * rows_b);
      });
    }
  }
}

void add_layers(const std::vector<Layer>& layers, const at::Tensor& out) {
  const int64_t rows = tile_rows(out);
  int64_t widest_a = 1, widest_b = 1;
  for (const Layer& layer : layers) {
    widest_a = std::max(widest_a, std::min(layer.terms_a(), rows));
    widest_b = std::max(widest_b, std::min(layer.terms_b(), rows));
  }
  // Layers may differ in T; the samples of a tile are those that fit with the largest. A sample whose terms are
  // summed part by part is a tile of its own.
  const int64_t samples_a = out.size(0), samples_b = out.size(1);
  const auto of_tile = [rows](const std::vector<Layer>& all, int64_t widest, bool is_a) {
    const bool split = std::any_of(all.begin(), all.end(), [rows, is_a](const Layer& layer) {
      return (is_a ? layer.terms_a() : layer.terms_b()) > rows;
    });
    return split ? int64_t{1} : std::max<int64_t>(1, rows / widest);
  };
  const int64_t step_a = std::min(samples_a, of_tile(layers, widest_a, true));
  const int64_t step_b = std::min(samples_b, of_tile(layers, widest_b, false));
  const int64_t tiles_a = (samples_a + step_a - 1) / step_a, tiles_b = (samples_b + step_b - 1) / step_b;
  const auto run = [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;  // a worker thread has not entered by the entry guard
    const at::Tensor gram = aten::empty({2 * step_a * widest_a * step_b * widest_b}, out.options());
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first_a = tile / tiles_b * step_a, first_b = tile % tiles_b * step_b;
      for (size_t l = 0; l < layers.size(); ++l) {
        add_tile(layers[l], first_a, std::min(step_a, samples_a - first_a), first_b,
                 std::min(step_b, samples_b - first_b), l == 0, gram, out);
      }
    }
  };
  // A device takes one after the other; of too few tiles to share out, each product is shared out instead.
  if (runs_cuda(out) || tiles_a * tiles_b < at::get_num_threads()) {
    run(0, tiles_a * tiles_b);
  } else {
    at::parallel_for(0, tiles_a * tiles_b, 1, run);
  }
}

// g [n, m] beside every pair of terms: [n, t, m, u] as rows and columns.
at::Tensor spread(const at::Tensor& g, const at::Tensor& gram, int64_t t, int64_t u) {
  const at::Tensor pairs = gram.view({g.size(0), t, g.size(1), u});
  return pairs.mul(g.view({g.size(0), 1, g.size(1), 1})).view(gram.sizes());
}

// [N, M], summed over layers; factors [N or M, (T,) features], bias a flag a layer.
at::Tensor grad_dot(at::TensorList inputs_a, at::TensorList output_grads_a, at::TensorList inputs_b,
                    at::TensorList output_grads_b, at::IntArrayRef bias) {
  constexpr const char* op = "grad_dot";
  check_lists(op, inputs_a, output_grads_a, inputs_b, output_grads_b, bias);
  const EntryGuard guard(op, inputs_a[0]);
  std::vector<Layer> layers = check_layers(op, inputs_a, output_grads_a, inputs_b, output_grads_b, bias);
  at::Tensor out = aten::empty({inputs_a[0].size(0), inputs_b[0].size(0)}, inputs_a[0].options());
  if (out.numel() == 0) {
    return out;
  }
  layers.erase(std::remove_if(layers.begin(), layers.end(),
                              [](const Layer& layer) { return layer.terms_a() == 0 || layer.terms_b() == 0; }),
               layers.end());
  if (layers.empty()) {
    return out.zero_();
  }
  add_layers(layers, out);
  return out;
}

// Gradients to the four lists, one after the other; empty where not needed.
std::vector<at::Tensor> grad_dot_backward(const at::Tensor& grad, at::TensorList inputs_a,
                                          at::TensorList output_grads_a, at::TensorList inputs_b,
                                          at::TensorList output_grads_b, at::IntArrayRef bias, at::IntArrayRef needs) {
  constexpr const char* op = "grad_dot_backward";
  check_lists(op, inputs_a, output_grads_a, inputs_b, output_grads_b, bias);
  const EntryGuard guard(op, inputs_a[0]);
  const std::vector<Layer> layers = check_layers(op, inputs_a, output_grads_a, inputs_b, output_grads_b, bias);
  const size_t depth = layers.size();
  FASTVAE_CHECK_VALUE(needs.size() == 4 * depth, op, "needs", 4 * depth, needs.size());
  check_like(op, "grad", grad, inputs_a[0], "inputs_a");
  check_sizes(op, "grad", grad, {inputs_a[0].size(0), inputs_b[0].size(0)});
  const at::TensorList given[] = {inputs_a, output_grads_a, inputs_b, output_grads_b};
  std::vector<at::Tensor> found(4 * depth);
  for (size_t i = 0; i < found.size(); ++i) {
    const at::Tensor& like = given[i / depth][i % depth];
    found[i] = needs[i] != 0 ? aten::zeros(like.sizes(), like.options()) : aten::empty({0}, like.options());
  }
  const at::Tensor g = grad.contiguous();
  for (size_t l = 0; l < depth; ++l) {
    const Layer& layer = layers[l];
    const int64_t t = layer.terms_a(), u = layer.terms_b();
    const at::Tensor inputs_b_rows = as_rows(layer.inputs_b), grads_b_rows = as_rows(layer.grads_b);
    const auto rows_of = [&](size_t list) {
      const at::Tensor& tensor = found[list * depth + l];
      return needs[list * depth + l] != 0 ? as_rows(as_terms(tensor)) : tensor;
    };
    const at::Tensor to[] = {rows_of(0), rows_of(1), rows_of(2), rows_of(3)};
    const auto needed = [&](size_t list) { return needs[list * depth + l] != 0; };
    const int64_t step = std::max<int64_t>(1, tile_rows(g) / std::max<int64_t>(1, t));
    for (int64_t first = 0; first < g.size(0); first += step) {
      const int64_t count = std::min(step, g.size(0) - first);
      const at::Tensor g_tile = g.narrow(0, first, count);
      const at::Tensor h = as_rows(layer.inputs_a).narrow(0, first * t, count * t);
      const at::Tensor delta = as_rows(layer.grads_a).narrow(0, first * t, count * t);
      if (needed(0) || needed(2)) {
        const at::Tensor weights = spread(g_tile, product(delta, grads_b_rows.t()), t, u);
        if (needed(0)) {
          add_product(to[0].narrow(0, first * t, count * t), weights, inputs_b_rows);
        }
        if (needed(2)) {
          add_product(to[2], weights.t(), h);
        }
      }
      if (needed(1) || needed(3)) {
        const at::Tensor gram = product(h, inputs_b_rows.t());
        const at::Tensor weights = spread(g_tile, layer.bias ? gram.add_(1) : gram, t, u);
        if (needed(1)) {
          add_product(to[1].narrow(0, first * t, count * t), weights, grads_b_rows);
        }
        if (needed(3)) {
          add_product(to[3], weights.t(), delta);
        }
      }
    }
  }
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastvae, m) {
  define_operator<&grad_dot>(
      m,
      "grad_dot(Tensor[] inputs_a, Tensor[] output_grads_a, Tensor[] inputs_b, Tensor[] output_grads_b, int[] bias) "
      "-> Tensor",
      differentiable<&grad_dot, Calls<&grad_dot_backward>>());
  define_operator<&grad_dot_backward>(
      m,
      "grad_dot_backward(Tensor grad, Tensor[] inputs_a, Tensor[] output_grads_a, Tensor[] inputs_b, "
      "Tensor[] output_grads_b, int[] bias, int[] needs) -> Tensor[]",
      differentiated_once("grad_dot"));
}

}  // namespace fastvae
