// Keys of samples and numbers of keys on a GPU (keyed_noise.h and math/splitmix.h give the formulas;
// cpu/keyed_noise.cpp is the twin, and gives the same keys and bits). A warp hashes a sample; sums of integers do not
// depend on their order.
#include "../math/splitmix.h"
#include "launch.cuh"

namespace fastvae::cuda {

__global__ void sample_keys_kernel(const SampleKeys args) {
  const int64_t words = args.row_bytes / 8;
  for (int64_t sample = global_thread() / kWarp; sample < args.samples; sample += global_threads() / kWarp) {
    const auto* const row = reinterpret_cast<const uint64_t*>(args.bytes + sample * args.row_bytes);
    uint64_t sum = 0;
    for (int64_t w = threadIdx.x % kWarp; w < words; w += kWarp) {
      sum += math::hash_fold(row[w]) * math::hash_multiplier(static_cast<uint64_t>(w));
    }
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) {
      args.keys[sample] = math::mix(sum + 8 * static_cast<uint64_t>(words));
    }
  }
}

__global__ void keyed_numbers_kernel(const KeyedNumbers args) {
  for (Walk at(global_thread(), global_threads(), args.rows * args.count, args.count); at.inside(); at.next()) {
    const uint64_t number = args.first + static_cast<uint64_t>(at.column);
    const uint64_t bits = math::keyed_bits(args.keys[at.i / args.count], number);
    if (args.bits != nullptr) {
      args.bits[at.i] = bits;
    } else {
      args.normal[at.i] = math::normal(bits);
    }
  }
}

void sample_keys(const SampleKeys& args, Stream stream) {
  launch("sample_keys", sample_keys_kernel, grid_for_elements(args.samples * kWarp), stream, args);
}

void keyed_numbers(const KeyedNumbers& args, Stream stream) {
  launch("keyed_numbers", keyed_numbers_kernel, grid_for_elements(args.rows * args.count), stream, args);
}

}  // namespace fastvae::cuda
