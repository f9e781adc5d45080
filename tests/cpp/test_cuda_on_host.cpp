// Each CUDA kernel, executed on the CPU by host_cuda.h, against its CPU twin.
#include "cases.h"

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
  for_each_case<T>([&](const std::string& name, int64_t count, auto build) {
    Arena<T> on_cpu;
    cpu_kernel(build(on_cpu), 0, count);
    Arena<T> on_cuda;
    cuda_kernel(build(on_cuda));
    const double error = difference(on_cuda, on_cpu);
    CHECK(error <= tolerance, "%s %s: off by %g", name.c_str(), type, error);
  });
}

}  // namespace
}  // namespace cases

int main() {
  cases::test_kernels<float>("float");
  cases::test_kernels<double>("double");
  return check::finish("test_cuda_on_host");
}
