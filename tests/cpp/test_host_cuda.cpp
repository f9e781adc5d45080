// host_cuda.h itself: launches that a device refuses, barriers that not all threads reach, what shared memory begins
// as. With the name of a kernel below: runs that one, in which a sanitizer has to find a fault (CMakeLists.txt).
#include "host_cuda.h"

#include <string_view>
#include <vector>

#include "check.h"

namespace {

constexpr int kThreads = 64, kBlocks = 3;

__global__ void nothing_kernel(int) {}

// What a launch throws, or nothing.
template <typename Kernel, typename... Args>
std::string fault_of(Kernel kernel, size_t shared_bytes, const Args&... args) {
  try {
    FASTVAE_CUDA_LAUNCH(kernel, kBlocks, kThreads, shared_bytes, nullptr, args...);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

template <typename Kernel, typename... Args>
void expect(const char* name, const char* part, Kernel kernel, size_t shared_bytes, const Args&... args) {
  const std::string fault = fault_of(kernel, shared_bytes, args...);
  const bool met = *part == 0 ? fault.empty() : fault.find(part) != std::string::npos;
  CHECK(met, "%s: '%s' instead of '%s'", name, fault.c_str(), part);
}

void test_limits() {
  const auto refused = [](unsigned grid, unsigned threads, size_t shared, size_t arguments) {
    try {
      host_cuda::check_launch(nothing_kernel, grid, threads, shared, arguments);
    } catch (const std::runtime_error&) {
      return true;
    }
    return false;
  };
  CHECK(!refused(1, 256, 48 * 1024, 4096), "check_launch: %s", "a good launch");
  CHECK(
      refused(0, 256, 0, 8) && refused(1, 1025, 0, 8) && refused(1, 256, 48 * 1024 + 1, 8) && refused(1, 256, 0, 4097),
      "check_launch: %s", "a bad launch");
  CHECK(cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 * 1024) != cudaSuccess &&
            cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024) == cudaSuccess,
        "cudaFuncSetAttribute: %s", "limits");
  CHECK(!refused(1, 256, 64 * 1024, 8) && refused(1, 256, 64 * 1024 + 1, 8), "check_launch: %s", "what was asked for");
}

// --- barriers --------------------------------------------------------------------------------------------------------

__global__ void two_places_kernel() {
  if (threadIdx.x < 8) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Those that have returned are not waited for, but others are.
__global__ void some_return_kernel(int waiting) {
  if (threadIdx.x < 40) {
    return;
  }
  if (threadIdx.x < static_cast<unsigned>(waiting)) {
    __syncwarp();
  }
  __syncthreads();
}

__global__ void half_a_warp_kernel() {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  }
  __syncthreads();
}

// Thread t of a block in the t-th place, by shared memory and by lanes.
__global__ void reversed_kernel(int* out) {
  FASTVAE_SHARED(int, numbers, [kThreads]);
  const int t = static_cast<int>(threadIdx.x);
  for (int turn = 0; turn < 3; ++turn) {
    numbers[t] = t + turn;
    __syncthreads();
    out[blockIdx.x * kThreads + t] = numbers[kThreads - 1 - t] - turn;
    __syncthreads();
  }
  const int other = __shfl_xor_sync(0xffffffffU, t, 5);
  out[blockIdx.x * kThreads + t] += other == (t ^ 5) ? 0 : 1000;
}

void test_barriers() {
  expect("two places", "wait at different places", two_places_kernel, 0);
  expect("some have returned", "", some_return_kernel, 64, 0);
  expect("half a warp", "wait for others that never come", half_a_warp_kernel, 0);
  std::vector<int> out(kBlocks * kThreads, -1);
  for (int launch = 0; launch < 5; ++launch) {
    expect("reversed", "", reversed_kernel, 0, out.data());
    for (int i = 0; i < kBlocks * kThreads; ++i) {
      CHECK(out[i] == kThreads - 1 - i % kThreads, "reversed: %d at %d", out[i], i);
    }
  }
}

// --- shared memory ---------------------------------------------------------------------------------------------------

__global__ void unwritten_kernel(int* numbers) {
  FASTVAE_SHARED(float, variable, [2][kThreads]);
  FASTVAE_DYNAMIC_SHARED(double, dynamic);
  const unsigned t = threadIdx.x;
  if (!std::isnan(variable[1][t]) || !std::isnan(dynamic[t])) {
    numbers[blockIdx.x * kThreads + t] = 1;
  }
  variable[1][t] = 1.0F;
  dynamic[t] = 1.0;
}

__global__ void much_kernel() {
  FASTVAE_SHARED(double, much, [5 * 1024]);
  FASTVAE_DYNAMIC_SHARED(double, dynamic);
  much[threadIdx.x] = dynamic[threadIdx.x] = 0.0;
}

void test_shared_memory() {
  std::vector<int> numbers(kBlocks * kThreads, 0);
  for (int launch = 0; launch < 2; ++launch) {
    expect("unwritten", "", unwritten_kernel, kThreads * sizeof(double), numbers.data());
  }
  CHECK(std::count(numbers.begin(), numbers.end(), 0) == kBlocks * kThreads, "unwritten: %s", "a number");
  expect("little", "", much_kernel, 8 * 1024);
  expect("much", "more shared memory", much_kernel, 8 * 1024 + 8);
}

// --- faults for sanitizers -------------------------------------------------------------------------------------------

__global__ void off_an_array(float* numbers) { numbers[blockIdx.x * kThreads + threadIdx.x + 1] = 1.0F; }

__global__ void off_shared_memory(float*) {
  FASTVAE_SHARED(float, variable, [kThreads]);
  float* const first = variable;
  first[threadIdx.x + 1] = 1.0F;
}

__global__ void no_barrier(float* numbers) {
  FASTVAE_SHARED(float, variable, [kThreads]);
  variable[threadIdx.x] = 1.0F;
  numbers[blockIdx.x * kThreads + threadIdx.x] = variable[threadIdx.x ^ 32];
}

__global__ void no_barrier_between_turns(float* numbers) {
  FASTVAE_SHARED(float, variable, [kThreads]);
  for (int turn = 0; turn < 2; ++turn) {
    variable[threadIdx.x] = 1.0F;
    __syncthreads();
    numbers[blockIdx.x * kThreads + threadIdx.x] = variable[threadIdx.x ^ 32];
  }
}

__global__ void blocks_in_one_place(float* numbers) {
  __syncthreads();
  numbers[threadIdx.x] = 1.0F;
}

int run_fault(std::string_view name) {
  std::vector<float> numbers(kBlocks * kThreads);
#define RUN_IF_NAMED(KERNEL)                                                    \
  if (name == #KERNEL) {                                                        \
    FASTVAE_CUDA_LAUNCH(KERNEL, kBlocks, kThreads, 0, nullptr, numbers.data()); \
    return 0;                                                                   \
  }
  RUN_IF_NAMED(off_an_array)
  RUN_IF_NAMED(off_shared_memory)
  RUN_IF_NAMED(no_barrier)
  RUN_IF_NAMED(no_barrier_between_turns)
  RUN_IF_NAMED(blocks_in_one_place)
#undef RUN_IF_NAMED
  return 2;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    return run_fault(arguments[1]);
  }
  test_limits();
  test_barriers();
  test_shared_memory();
  return check::finish("test_host_cuda");
}
