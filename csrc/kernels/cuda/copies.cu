// Networks of which every sample owns a copy, on a GPU (copies.h gives the formulas; cpu/copies.cpp is the twin).
//
// Memory bound, 24 bytes a number and step in float32. Where a product runs over the rows of a sample, a block takes
// some of the rows and a thread its columns, and what the blocks have found is summed in order; where a row is reduced,
// a warp takes the row.
#include "launch.cuh"

namespace fastvae::cuda {

template <typename T>
__global__ void adam_update_kernel(const AdamUpdate<T> args) {
  const math::AdamRate<T> rate = args.rates[*args.taken];
  for (int64_t i = global_thread(); i < args.size; i += global_threads()) {
    math::adam(args.value[i], args.mean[i], args.square[i], args.grad[i], args.adam, rate);
  }
}

template <typename T>
__device__ T input_of(const CopiedRows<T>& layer, const T* h, int64_t sample, int64_t j) {
  return j < layer.in ? h[sample * layer.in + j] : T(1);
}

// One number of a row that has seen `seen` steps, as it is after `steps`; the caller notes what it has seen then.
template <typename T>
__device__ T caught_up(const CopiedRows<T>& layer, int64_t i, int64_t seen, int64_t steps) {
  T value = layer.value[i];
  if (seen < steps) {
    T mean = layer.mean[i], square = layer.square[i];
    for (int64_t step = seen; step < steps; ++step) {
      math::adam(value, mean, square, T(0), layer.adam, layer.rates[step]);
    }
    layer.value[i] = value;
    layer.mean[i] = mean;
    layer.square[i] = square;
  }
  return value;
}

// The rows of a sample that a block works on, its threads as `lanes` rows of columns side by side.
template <typename T>
struct RowChunk {
  __device__ RowChunk(const CopiedRows<T>& layer, int64_t block) {
    const int64_t chunks = copies_chunks(layer.rows());
    sample = block / chunks;
    first = block % chunks * kCopiedRowsOfChunk;
    end = first + kCopiedRowsOfChunk < layer.rows() ? first + kCopiedRowsOfChunk : layer.rows();
    width = layer.out < kThreads ? layer.out : kThreads;
    lanes = kThreads / width;
    lane = threadIdx.x / width;
    column = threadIdx.x % width;
  }
  int64_t sample, first, end, width, lanes, lane, column;
};

// Calls term(row, column) for the block's rows and columns and writes the sums over its rows to out [out], unless that
// is null. All threads of the block must call.
template <typename T, typename Term>
__device__ void sum_rows(const CopiedRows<T>& layer, const RowChunk<T>& chunk, T* out, const Term& term) {
  FASTVAE_SHARED(T, of_lane, [kThreads]);
  for (int64_t o = chunk.column; chunk.lane < chunk.lanes && o < layer.out; o += chunk.width) {
    T sum = T(0);
    for (int64_t j = chunk.first + chunk.lane; j < chunk.end; j += chunk.lanes) {
      sum += term(j, o);
    }
    if (chunk.lanes > 1) {
      of_lane[threadIdx.x] = sum;  // one column a thread then
    } else if (out != nullptr) {
      out[o] = sum;
    }
  }
  __syncthreads();
  if (chunk.lanes > 1 && chunk.lane == 0 && out != nullptr) {
    T sum = T(0);
    for (int64_t lane = 0; lane < chunk.lanes; ++lane) {
      sum += of_lane[lane * chunk.width + chunk.column];
    }
    out[chunk.column] = sum;
  }
}

// Once all threads of the block are through with a chunk: its rows with an input have seen `steps`.
template <typename T>
__device__ void note_seen(const CopiedRows<T>& layer, const RowChunk<T>& chunk, const T* h, int64_t steps) {
  __syncthreads();
  for (int64_t j = chunk.first + threadIdx.x; j < chunk.end; j += blockDim.x) {
    if (h == nullptr || input_of(layer, h, chunk.sample, j) != T(0)) {
      layer.seen[chunk.sample * layer.rows() + j] = static_cast<int32_t>(steps);
    }
  }
}

template <typename T>
__global__ void copies_product_kernel(const CopiesProduct<T> args, T* out) {
  const CopiedRows<T>& layer = args.layer;
  const int64_t steps = layer.steps();
  for (int64_t block = blockIdx.x; block < layer.samples * copies_chunks(layer.rows()); block += gridDim.x) {
    const RowChunk<T> chunk(layer, block);
    sum_rows(layer, chunk, out + block * layer.out, [&](int64_t j, int64_t o) {
      const T h = input_of(layer, args.h, chunk.sample, j);
      const int64_t row = chunk.sample * layer.rows() + j;
      return h == T(0) ? T(0) : h * caught_up(layer, row * layer.out + o, layer.seen[row], steps);
    });
    note_seen(layer, chunk, args.h, steps);
  }
}

// Without grad_h: a thread a column, so that the next product needs no reduction over threads.
template <typename T>
__global__ void copies_update_columns_kernel(const CopiesUpdate<T> args, T* out) {
  const CopiedRows<T>& layer = args.layer;
  const int64_t steps = layer.steps();
  const math::AdamRate<T> rate = layer.rates[steps];
  for (int64_t block = blockIdx.x; block < layer.samples * copies_chunks(layer.rows()); block += gridDim.x) {
    const RowChunk<T> chunk(layer, block);
    sum_rows(layer, chunk, out == nullptr ? out : out + block * layer.out, [&](int64_t j, int64_t o) {
      const T h = input_of(layer, args.h, chunk.sample, j);
      if (h == T(0)) {
        return T(0);
      }
      const int64_t row = chunk.sample * layer.rows() + j, i = row * layer.out + o;
      caught_up(layer, i, layer.seen[row], steps);
      const T delta = args.delta[chunk.sample * layer.out + o];
      math::adam(layer.value[i], layer.mean[i], layer.square[i], h * delta, layer.adam, rate);
      return h * layer.value[i];
    });
    note_seen(layer, chunk, args.h, steps + 1);
  }
}

// With grad_h: a warp a row.
template <typename T>
__global__ void copies_update_rows_kernel(const CopiesUpdate<T> args) {
  const CopiedRows<T>& layer = args.layer;
  const int64_t steps = layer.steps();
  const math::AdamRate<T> rate = layer.rates[steps];
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
      sum += caught_up(layer, i, seen, steps) * delta[o];
      if (!idle) {
        math::adam(layer.value[i], layer.mean[i], layer.square[i], h * delta[o], layer.adam, rate);
      }
    }
    sum = warp_sum(sum);  // behind it, all lanes have read what the row has seen
    if (lane == 0) {
      layer.seen[row] = static_cast<int32_t>(idle ? steps : steps + 1);
      if (asked) {
        args.grad_h[sample * layer.in + j] = sum;
      }
    }
  }
}

template <typename T>
__global__ void copies_catch_up_kernel(const CopiesCatchUp<T> args) {
  const CopiedRows<T>& layer = args.layer;
  const int64_t steps = layer.steps();
  for (int64_t block = blockIdx.x; block < layer.samples * copies_chunks(layer.rows()); block += gridDim.x) {
    const RowChunk<T> chunk(layer, block);
    const int64_t begin = chunk.sample * layer.rows();
    for (int64_t k = chunk.first * layer.out + threadIdx.x; k < chunk.end * layer.out; k += blockDim.x) {
      caught_up(layer, begin * layer.out + k, layer.seen[begin + k / layer.out], steps);
    }
    note_seen<T>(layer, chunk, nullptr, steps);
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

// A block takes some channels of a sample, which its rows of threads sum over their share of the positions: few, so
// that a sample is many blocks' and a thread's loads, one after the other, are few; as many as memory gives at once.
constexpr int kNormChannels = 8;

template <typename T>
__global__ void copies_norm_reverse_kernel(const CopiesNormReverse<T> args) {
  constexpr int kRows = kThreads / kNormChannels;
  FASTVAE_SHARED(T, of_gamma, [kRows][kNormChannels]);
  FASTVAE_SHARED(T, of_beta, [kRows][kNormChannels]);
  const int64_t groups = (args.channels + kNormChannels - 1) / kNormChannels;
  const int row = static_cast<int>(threadIdx.x) / kNormChannels, lane = static_cast<int>(threadIdx.x) % kNormChannels;
  for (int64_t block = blockIdx.x; block < args.samples * groups; block += gridDim.x) {
    const int64_t sample = block / groups, channel = block % groups * kNormChannels + lane;
    const int64_t gamma = sample * args.channels + channel;
    T grad_gamma = T(0), grad_beta = T(0);
    if (channel < args.channels) {
      const T mean = args.mean[channel], rstd = args.rstd[channel], slope = args.affine[gamma] * rstd;
      for (int64_t p = row; p < args.positions; p += kRows) {
        const int64_t i = (sample * args.positions + p) * args.channels + channel;
        const T delta = args.delta[i];
        grad_gamma += delta * (args.h[i] - mean) * rstd;
        grad_beta += delta;
        if (args.grad_h != nullptr) {
          args.grad_h[i] = delta * slope;
        }
      }
    }
    of_gamma[row][lane] = grad_gamma;
    of_beta[row][lane] = grad_beta;
    __syncthreads();
    if (row == 0 && channel < args.channels) {
      for (int other = 1; other < kRows; ++other) {
        grad_gamma += of_gamma[other][lane];
        grad_beta += of_beta[other][lane];
      }
      args.grad_affine[gamma] = grad_gamma;
      args.grad_affine[gamma + args.samples * args.channels] = grad_beta;
    }
    __syncthreads();  // the sums have been read
  }
}

template <typename T>
Grid grid_for_chunks(const CopiedRows<T>& layer) {
  return {layer.samples * copies_chunks(layer.rows())};
}

// Launches a kernel that sums over the rows of each sample's chunks, into `out` in the end.
template <typename T, typename Kernel, typename Args>
void launch_with_sum(const char* name, Kernel kernel, const Args& args, T* out, Stream stream) {
  const int64_t chunks = copies_chunks(args.layer.rows());
  launch(name, kernel, grid_for_chunks(args.layer), stream, args, out == nullptr || chunks == 1 ? out : args.partial);
  if (out != nullptr && chunks > 1) {
    sum_chunks<T>(args.partial, out, args.layer.samples, chunks, args.layer.out, stream);
  }
}

template <typename T>
void adam_update_launch(const AdamUpdate<T>& args, Stream stream) {
  launch("adam_update", adam_update_kernel<T>, grid_for_elements(args.size), stream, args);
}

template <typename T>
void copies_product_launch(const CopiesProduct<T>& args, Stream stream) {
  launch_with_sum("copies_product", copies_product_kernel<T>, args, args.a, stream);
}

template <typename T>
void copies_update_launch(const CopiesUpdate<T>& args, Stream stream) {
  if (args.grad_h == nullptr) {
    launch_with_sum("copies_update", copies_update_columns_kernel<T>, args, args.next, stream);
  } else {
    launch("copies_update", copies_update_rows_kernel<T>,
           grid_for_elements(args.layer.samples * args.layer.rows() * kWarp), stream, args);
  }
}

template <typename T>
void copies_catch_up_launch(const CopiesCatchUp<T>& args, Stream stream) {
  launch("copies_catch_up", copies_catch_up_kernel<T>, grid_for_chunks(args.layer), stream, args);
}

template <typename T>
void copies_norm_launch(const CopiesNorm<T>& args, Stream stream) {
  launch("copies_norm", copies_norm_kernel<T>, grid_for_elements(args.samples * args.positions * args.channels), stream,
         args);
}

template <typename T>
void copies_norm_reverse_launch(const CopiesNormReverse<T>& args, Stream stream) {
  launch("copies_norm_reverse", copies_norm_reverse_kernel<T>,
         Grid{args.samples * ((args.channels + kNormChannels - 1) / kNormChannels)}, stream, args);
}

FASTVAE_FOR_EACH_COPIES_KERNEL(FASTVAE_DEFINE_CUDA)

}  // namespace fastvae::cuda
