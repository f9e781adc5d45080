// The CPU kernels of networks of which every sample owns a copy; those of CUDA: test_cuda_on_host.cpp.
#include "copies_cases.h"

namespace cases {
namespace {

// A kernel by its arguments, sample by sample: splitting may not matter.
struct OnCpu {
  template <typename T>
  void operator()(const AdamUpdate<T>& args) const {
    fastvae::cpu::adam_update(args, args.size / 2, args.size);
    fastvae::cpu::adam_update(args, 0, args.size / 2);
  }
#define FASTVAE_TEST_BY_SAMPLE(NAME, ARGS, SAMPLES)      \
  template <typename T>                                  \
  void operator()(const ARGS<T>& args) const {           \
    for (int64_t sample = args.SAMPLES; sample-- > 0;) { \
      fastvae::cpu::NAME(args, sample, sample + 1);      \
    }                                                    \
  }
  FASTVAE_TEST_BY_SAMPLE(copies_product, CopiesProduct, layer.samples)
  FASTVAE_TEST_BY_SAMPLE(copies_update, CopiesUpdate, layer.samples)
  FASTVAE_TEST_BY_SAMPLE(copies_catch_up, CopiesCatchUp, layer.samples)
  FASTVAE_TEST_BY_SAMPLE(copies_norm, CopiesNorm, samples)
  FASTVAE_TEST_BY_SAMPLE(copies_norm_reverse, CopiesNormReverse, samples)
#undef FASTVAE_TEST_BY_SAMPLE
};

}  // namespace
}  // namespace cases

int main() {
  cases::check_all_copies<float>("float", cases::OnCpu{});
  cases::check_all_copies<double>("double", cases::OnCpu{});
  return check::finish("test_copies");
}
