// What heads of either kind share: a block takes a chunk of a sample, and log probabilities are summed over it.
#pragma once

#include "launch.cuh"

namespace fastvae::cuda {

// The chunk of a sample that a block works on: its numbers are first <= i < end.
struct HeadChunk {
  __device__ HeadChunk(int64_t block, int64_t chunks, int64_t numbers) : sample(block / chunks) {
    const int64_t chunk = block % chunks, each = (numbers + chunks - 1) / chunks;
    first = chunk * each;
    end = first + each < numbers ? first + each : numbers;
  }
  int64_t sample, first, end;
};

// The sum of a block's log probabilities, where they are wanted. All threads of the block must call.
template <typename T, typename Args>
__device__ void note_log_prob(const Args& args, int64_t block, T sum) {
  if (args.log_prob != nullptr) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
      (args.partial == nullptr ? args.log_prob : args.partial)[block] = sum;
    }
  }
}

// The chunks of a sample of so many numbers where nothing is summed over them: a number a thread.
inline int64_t unsummed_chunks(int64_t numbers) { return (numbers + kThreads - 1) / kThreads; }

}  // namespace fastvae::cuda
