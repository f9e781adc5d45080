// Networks of which every sample owns a copy, on a GPU (copies.h gives the formulas; cpu/copies.cpp is the twin).
//
// Memory bound, 24 bytes a number and step in float32. Where a product runs over the rows of a sample, a block takes
// the sample and a thread its columns; where a row is reduced, a warp takes the row.
#include "launch.cuh"

namespace fastvae::cuda {

template <typename T>
__global__ void adam_update_kernel(const AdamUpdate<T> args) {
  for (int64_t i = global_thread(); i < args.size; i += global_threads()) {
    math::adam(args.value[i], args.mean[i], args.square[i], args.grad[i], args.adam, args.rate);
  }
}

template <typename T>
__device__ T input_of(const CopiedRows<T>& layer, const T* h, int64_t sample, int64_t j) {
  return j < layer.in ? h[sample * layer.in + j] : T(1);
}

// One number of a row that has seen `seen` steps; the caller notes what it has seen then.
template <typename T>
__device__ void catch_up(const CopiedRows<T>& layer, int64_t i, int64_t seen) {
  for (int64_t step = seen; step < layer.steps; ++step) {
    math::adam(layer.value[i], layer.mean[i], layer.square[i], T(0), layer.adam, layer.rates[step]);
  }
}

// Once all threads of the block are through with a sample: its rows with an input have seen `steps`.
template <typename T>
__device__ void note_seen(const CopiedRows<T>& layer, const T* h, int64_t sample, int64_t steps) {
  __syncthreads();
  for (int64_t j = threadIdx.x; j < layer.rows(); j += blockDim.x) {
    if (input_of(layer, h, sample, j) != T(0)) {
      layer.seen[sample * layer.rows() + j] = static_cast<int32_t>(steps);
    }
  }
}

template <typename T>
__global__ void copies_product_kernel(const CopiesProduct<T> args) {
  const CopiedRows<T>& layer = args.layer;
  for (int64_t sample = blockIdx.x; sample < layer.samples; sample += gridDim.x) {
    for (int64_t o = threadIdx.x; o < layer.out; o += blockDim.x) {
      T sum = T(0);
      for (int64_t j = 0; j < layer.rows(); ++j) {
        const T h = input_of(layer, args.h, sample, j);
        if (h != T(0)) {
          const int64_t row = sample * layer.rows() + j;
          catch_up(layer, row * layer.out + o, layer.seen[row]);
          sum += h * layer.value[row * layer.out + o];
        }
      }
      args.a[sample * layer.out + o] = sum;
    }
    note_seen(layer, args.h, sample, layer.steps);
  }
}

// Without grad_h: a thread a column, so that the next product needs no reduction.
template <typename T>
__global__ void copies_update_columns_kernel(const CopiesUpdate<T> args) {
  const CopiedRows<T>& layer = args.layer;
  const math::AdamRate<T> rate = layer.rates[layer.steps];
  for (int64_t sample = blockIdx.x; sample < layer.samples; sample += gridDim.x) {
    for (int64_t o = threadIdx.x; o < layer.out; o += blockDim.x) {
      const T delta = args.delta[sample * layer.out + o];
      T sum = T(0);
      for (int64_t j = 0; j < layer.rows(); ++j) {
        const T h = input_of(layer, args.h, sample, j);
        if (h != T(0)) {
          const int64_t row = sample * layer.rows() + j, i = row * layer.out + o;
          catch_up(layer, i, layer.seen[row]);
          math::adam(layer.value[i], layer.mean[i], layer.square[i], h * delta, layer.adam, rate);
          sum += h * layer.value[i];
        }
      }
      if (args.next != nullptr) {
        args.next[sample * layer.out + o] = sum;
      }
    }
    note_seen(layer, args.h, sample, layer.steps + 1);
  }
}

// With grad_h: a warp a row.
template <typename T>
__global__ void copies_update_rows_kernel(const CopiesUpdate<T> args) {
  const CopiedRows<T>& layer = args.layer;
  const math::AdamRate<T> rate = layer.rates[layer.steps];
  const int64_t lane = threadIdx.x % kWarp;
  for (int64_t row = global_thread() / kWarp; row < layer.samples * layer.rows(); row += global_threads() / kWarp) {
    const int64_t sample = row / layer.rows(), j = row % layer.rows();
    const T h = input_of(layer, args.h, sample, j);
    const bool asked = j < layer.in, idle = h == T(0);
    if (idle && (!asked || args.flat_at_zero)) {
      if (asked && lane == 0) {
        args.grad_h[sample * layer.in + j] = T(0);
      }
      continue;
    }
    const T* delta = args.delta + sample * layer.out;
    const int64_t seen = layer.seen[row];
    T sum = T(0);
    for (int64_t o = lane; o < layer.out; o += kWarp) {
      const int64_t i = row * layer.out + o;
      catch_up(layer, i, seen);
      sum += layer.value[i] * delta[o];
      if (!idle) {
        math::adam(layer.value[i], layer.mean[i], layer.square[i], h * delta[o], layer.adam, rate);
      }
    }
    sum = warp_sum(sum);  // behind it, all lanes have read what the row has seen
    if (lane == 0) {
      layer.seen[row] = static_cast<int32_t>(idle ? layer.steps : layer.steps + 1);
      if (asked) {
        args.grad_h[sample * layer.in + j] = sum;
      }
    }
  }
}

template <typename T>
__global__ void copies_catch_up_kernel(const CopiesCatchUp<T> args) {
  const CopiedRows<T>& layer = args.layer;
  for (int64_t sample = blockIdx.x; sample < layer.samples; sample += gridDim.x) {
    for (int64_t k = threadIdx.x; k < layer.rows() * layer.out; k += blockDim.x) {
      catch_up(layer, sample * layer.rows() * layer.out + k, layer.seen[sample * layer.rows() + k / layer.out]);
    }
    __syncthreads();
    for (int64_t j = threadIdx.x; j < layer.rows(); j += blockDim.x) {
      layer.seen[sample * layer.rows() + j] = static_cast<int32_t>(layer.steps);
    }
  }
}

template <typename T>
__global__ void copies_norm_kernel(const CopiesNorm<T> args) {
  const int64_t size = args.samples * args.positions * args.channels;
  for (Walk at(global_thread(), global_threads(), size, args.channels); at.inside(); at.next()) {
    const int64_t sample = at.i / (args.positions * args.channels);
    const int64_t gamma = sample * args.channels + at.column;
    args.a[at.i] = (args.h[at.i] - args.mean[at.column]) * args.rstd[at.column] * args.affine[gamma] +
                   args.affine[gamma + args.samples * args.channels];
  }
}

// One thread a channel of a sample, which it sums.
template <typename T>
__global__ void copies_norm_reverse_kernel(const CopiesNormReverse<T> args) {
  Walk at(global_thread(), global_threads(), args.samples * args.channels, args.channels);
  for (; at.inside(); at.next()) {
    const int64_t sample = at.i / args.channels;
    const int64_t gamma = sample * args.channels + at.column;
    const T mean = args.mean[at.column], rstd = args.rstd[at.column];
    T grad_gamma = T(0), grad_beta = T(0);
    for (int64_t p = 0; p < args.positions; ++p) {
      const int64_t i = (sample * args.positions + p) * args.channels + at.column;
      const T delta = args.delta[i];
      grad_gamma += delta * (args.h[i] - mean) * rstd;
      grad_beta += delta;
      if (args.grad_h != nullptr) {
        args.grad_h[i] = delta * args.affine[gamma] * rstd;
      }
    }
    args.grad_affine[gamma] = grad_gamma;
    args.grad_affine[gamma + args.samples * args.channels] = grad_beta;
  }
}

template <typename T>
void adam_update_launch(const AdamUpdate<T>& args, Stream stream) {
  launch("adam_update", adam_update_kernel<T>, grid_for_elements(args.size), stream, args);
}

template <typename T>
void copies_product_launch(const CopiesProduct<T>& args, Stream stream) {
  launch("copies_product", copies_product_kernel<T>, Grid{args.layer.samples}, stream, args);
}

template <typename T>
void copies_update_launch(const CopiesUpdate<T>& args, Stream stream) {
  if (args.grad_h == nullptr) {
    launch("copies_update", copies_update_columns_kernel<T>, Grid{args.layer.samples}, stream, args);
  } else {
    launch("copies_update", copies_update_rows_kernel<T>,
           grid_for_elements(args.layer.samples * args.layer.rows() * kWarp), stream, args);
  }
}

template <typename T>
void copies_catch_up_launch(const CopiesCatchUp<T>& args, Stream stream) {
  launch("copies_catch_up", copies_catch_up_kernel<T>, Grid{args.layer.samples}, stream, args);
}

template <typename T>
void copies_norm_launch(const CopiesNorm<T>& args, Stream stream) {
  launch("copies_norm", copies_norm_kernel<T>, grid_for_elements(args.samples * args.positions * args.channels), stream,
         args);
}

template <typename T>
void copies_norm_reverse_launch(const CopiesNormReverse<T>& args, Stream stream) {
  launch("copies_norm_reverse", copies_norm_reverse_kernel<T>, grid_for_elements(args.samples * args.channels), stream,
         args);
}

FASTVAE_FOR_EACH_COPIES_KERNEL(FASTVAE_DEFINE_CUDA)

}  // namespace fastvae::cuda
