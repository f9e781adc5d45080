// The product of two Gram tiles on a GPU, summed over the terms of each pair of samples (kernels.h gives the formula;
// cpu/grad_dot.cpp is the twin).
//
// Cost: 2 reads and 2 FLOPs a pair of terms, out of L2 where the products before it have left them. A thread takes a
// column and sums it over the terms of a; the columns of a pair are then summed in their order, so results repeat.
#include "launch.cuh"

namespace fastvae::cuda {

// Pairs of a block: those whose columns its threads can take at once.
template <typename T>
__host__ __device__ int64_t pairs_of_block(const GramProduct<T>& args) {
  return args.terms_b < kThreads ? kThreads / args.terms_b : 1;
}

// Sum over the terms of a, of one column.
template <typename T>
__device__ T column_sum(const GramProduct<T>& args, int64_t sample, int64_t column, int64_t columns) {
  const T bias = args.bias ? T(1) : T(0);
  const T* of_inputs = args.of_inputs + sample * args.terms_a * columns + column;
  const T* of_grads = args.of_grads + sample * args.terms_a * columns + column;
  T sum = T(0);
#pragma unroll 4
  for (int64_t t = 0; t < args.terms_a; ++t) {
    sum += (of_inputs[t * columns] + bias) * of_grads[t * columns];
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gram_product_kernel(const GramProduct<T> args) {
  // Every 32 numbers one is left out, against bank conflicts.
  FASTVAE_SHARED(T, of_column, [kThreads + kThreads / kWarp]);
  const auto place = [](int64_t i) { return i + i / kWarp; };
  const int64_t columns = args.samples_b * args.terms_b, pairs = pairs_of_block(args);
  const int64_t chunks = (args.samples_b + pairs - 1) / pairs;
  const int64_t thread = threadIdx.x;
  for (int64_t block = blockIdx.x; block < args.samples_a * chunks; block += gridDim.x) {
    const int64_t sample = block / chunks, first = block % chunks * pairs;
    const int64_t count = pairs < args.samples_b - first ? pairs : args.samples_b - first;
    T sum = T(0);
    for (int64_t i = thread; i < count * args.terms_b; i += kThreads) {  // more than one of a long pair
      sum += column_sum(args, sample, first * args.terms_b + i, columns);
    }
    of_column[place(thread)] = sum;
    __syncthreads();
    if (thread < count) {
      const int64_t width = args.terms_b < kThreads ? args.terms_b : kThreads;
      T total = T(0);
      for (int64_t i = 0; i < width; ++i) {
        total += of_column[place(thread * width + i)];
      }
      T* out = args.out + sample * args.out_stride + first + thread;
      *out = args.accumulate ? *out + total : total;
    }
    __syncthreads();  // the sums have been read
  }
}

template <typename T>
void gram_product_launch(const GramProduct<T>& args, Stream stream) {
  const int64_t pairs = pairs_of_block(args);
  launch("gram_product", gram_product_kernel<T>, Grid{args.samples_a * ((args.samples_b + pairs - 1) / pairs)}, stream,
         args);
}

FASTVAE_DEFINE_CUDA(gram_product, GramProduct)

}  // namespace fastvae::cuda
