// Each CUDA kernel, executed on the CPU by host_cuda.h, against its CPU twin.
#include "copies_cases.h"
#include "flow_cases.h"
#include "host_cuda.h"
#include "noise_cases.h"

namespace cases {
namespace {

#define FASTVAE_TEST_CUDA(NAME, ARGS)     \
  template <typename T>                   \
  void cuda_kernel(const ARGS<T>& args) { \
    fastvae::cuda::NAME(args, nullptr);   \
  }
FASTVAE_FOR_EACH_KERNEL(FASTVAE_TEST_CUDA)
#undef FASTVAE_TEST_CUDA

template <typename T>
void test_kernels(const char* type) {
  // The same formulas, but for fused multiply-adds and the order of sums of up to 1,300 terms of size one.
  const double tolerance = 40.0 * std::numeric_limits<T>::epsilon();
  const auto compare = [&](const std::string& name, int64_t count, auto build) {
    Arena<T> on_cpu;
    cpu_kernel(build(on_cpu), 0, count);
    Arena<T> on_cuda;
    cuda_kernel(build(on_cuda));
    const double error = difference(on_cuda, on_cpu);
    CHECK(error <= tolerance, "%s %s: off by %g", name.c_str(), type, error);
  };
  for_each_case<T>(compare);
  for_each_window<T>(1, {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1}, compare);
  for_each_window<T>(2, {3, 4, 4, 8, 8, 4, 4, 2, 2, 1, 1, 1, 1}, compare);
  for_each_window<T>(3, {2, 4, 6, 9, 7, 3, 2, 2, 1, 1, 0, 1, 2}, compare);
}

// As above, over a trajectory; and where there is more than one block twice, since sums may not depend on which thread
// comes first.
template <typename T, typename Make, typename MakeCuda>
void test_flow(const char* kernel, const FlowCase& flow, const char* type, int64_t count, Make make,
               MakeCuda make_cuda) {
  const double tolerance = 400.0 * std::numeric_limits<T>::epsilon();
  Arena<T> on_cpu, on_cuda;
  cpu_kernel(make(flow, on_cpu), 0, count);
  cuda_kernel(make_cuda(flow, on_cuda));
  const double error = difference(on_cuda, on_cpu);
  CHECK(error <= tolerance, "%s %s %s: off by %g", kernel, flow.name.c_str(), type, error);
  if (count > 1) {
    Arena<T> again;
    cuda_kernel(make_cuda(flow, again));
    CHECK(same_bits(on_cuda, again), "%s %s %s: does not repeat", kernel, flow.name.c_str(), type);
  }
}

// The sum over tasks, where two layers may share a tensor and some want none.
template <typename T>
void test_flow_sum(const char* type) {
  SmallFlowSum<T> sum{};
  sum.tasks = 5;
  sum.depth = 3;
  const int64_t shapes[][2] = {{3, 70}, {7, 7}, {7, 7}};  // in, out
  int64_t parameters = 0;
  for (int l = 0; l < sum.depth; ++l) {
    sum.in[l] = shapes[l][0];
    sum.out[l] = shapes[l][1];
    parameters += sum.out[l] * (sum.in[l] + 1);
  }
  Arena<T> arena;
  const T* parts = arena.random(sum.tasks * parameters);
  sum.grad_parameters = parts;
  sum.weight[0] = arena.filled(3 * 70, T(1));
  sum.bias[0] = arena.filled(70, T(1));
  sum.weight[1] = sum.weight[2] = arena.filled(7 * 7, T(1));
  sum.bias[2] = arena.filled(7, T(1));
  fastvae::cuda::small_flow_sum(sum, nullptr);
  const auto expected = [&](int64_t place) {
    double total = 0.0;
    for (int64_t task = 0; task < sum.tasks; ++task) {
      total += parts[task * parameters + place];
    }
    return total;
  };
  double worst = 0.0;
  const auto compare = [&](const T* got, int64_t count, int64_t place, int64_t second) {
    for (int64_t i = 0; i < count; ++i) {
      const double total = 1.0 + expected(place + i) + (second < 0 ? 0.0 : expected(second + i));
      worst = std::max(worst, std::abs(static_cast<double>(got[i]) - total));
    }
  };
  compare(sum.weight[0], 210, 0, -1);
  compare(sum.bias[0], 70, 210, -1);
  compare(sum.weight[1], 49, 280, 280 + 56);
  compare(sum.bias[2], 7, 280 + 56 + 49, -1);
  CHECK(worst <= 40.0 * std::numeric_limits<T>::epsilon(), "small_flow_sum %s: off by %g", type, worst);
}

template <typename T>
void test_flows(const char* type) {
  for (const FlowCase& flow : flow_cases()) {
    test_flow<T>("small_flow", flow, type, flow_blocks<T>(flow), make_flow<T>, make_flow<T>);
    test_flow<T>("small_flow_backward", flow, type, std::min(flow.tasks, flow_blocks<T>(flow)),
                 make_flow_backward_on_cpu<T>, [](const FlowCase& of, Arena<T>& arena) {
                   return make_flow_backward(of, arena, [](const SmallFlow<T>& forward) { cuda_kernel(forward); });
                 });
  }
  test_flow_sum<T>(type);
}

void test_flow_fits() {
  const auto fits = [](int64_t width, auto number, int device) {
    SmallNetwork<decltype(number)> network{};
    network.depth = 2;
    network.in[0] = 2;
    network.out[0] = network.in[1] = network.out[1] = width;
    return fastvae::cuda::small_flow_fits(network, 2, device);
  };
  CHECK(fits(64, 0.0F, 0) && fits(200, 0.0F, 0) && !fits(240, 0.0F, 0), "small_flow_fits %s", "float");
  CHECK(fits(64, 0.0, 0) && !fits(200, 0.0, 0) && !fits(int64_t{1} << 20, 0.0, 0), "small_flow_fits %s", "double");
  CHECK(!fits(64, 0.0F, 1), "small_flow_fits: %s", "a device that is not there");
}

void test_noise() {
  struct OnCpu {
    void operator()(const SampleKeys& args) const { fastvae::cpu::sample_keys(args, 0, args.samples); }
    void operator()(const KeyedNumbers& args) const { fastvae::cpu::keyed_numbers(args, 0, args.rows); }
  };
  struct OnHostCuda {
    void operator()(const SampleKeys& args) const { fastvae::cuda::sample_keys(args, nullptr); }
    void operator()(const KeyedNumbers& args) const { fastvae::cuda::keyed_numbers(args, nullptr); }
  };
  for_each_noise(true, [](int64_t samples, int64_t row_bytes, int64_t count, uint64_t first) {
    Noise expected = noise_case(samples, row_bytes, count), found = expected;
    fill(expected, samples, row_bytes, count, first, OnCpu{});
    fill(found, samples, row_bytes, count, first, OnHostCuda{});
    CHECK(found.keys == expected.keys && found.bits == expected.bits, "keyed noise: other bits of %d samples",
          static_cast<int>(samples));
    for (size_t i = 0; i < found.normal.size(); ++i) {
      // The same formula, but for fused multiply-adds.
      const double error = std::abs(found.normal[i] - expected.normal[i]) / std::abs(expected.normal[i]);
      CHECK(error < 1e-14, "keyed noise: %g where %g was expected", found.normal[i], expected.normal[i]);
    }
  });
}

struct OnCuda {
#define FASTVAE_TEST_BY_TYPE(NAME, ARGS)       \
  template <typename T>                        \
  void operator()(const ARGS<T>& args) const { \
    fastvae::cuda::NAME(args, nullptr);        \
  }
  FASTVAE_FOR_EACH_COPIES_KERNEL(FASTVAE_TEST_BY_TYPE)
#undef FASTVAE_TEST_BY_TYPE
};

}  // namespace
}  // namespace cases

int main() {
  cases::test_flows<float>("float");
  cases::test_flows<double>("double");
  cases::test_flow_fits();
  cases::test_kernels<float>("float");
  cases::test_kernels<double>("double");
  cases::test_noise();
  cases::check_all_copies<float>("float", cases::OnCuda{});
  cases::check_all_copies<double>("double", cases::OnCuda{});
  return check::finish("test_cuda_on_host");
}
