// Likelihoods of elements with several outputs each, on a GPU (kernels.h says what; cpu/element_heads.cpp is the twin).
//
// A block takes a chunk of a sample, as in heads.cu. Memory bound: an element's outputs, datum and weight are read
// once.
#include "heads.cuh"

namespace fastvae::cuda {

template <typename Rules, typename T>
__global__ void element_residual_kernel(const ElementHeadResidual<T> args, const Rules rules, int64_t chunks) {
  constexpr int kOutputs = Rules::kOutputs;
  const int64_t n = args.size;
  for (int64_t block = blockIdx.x; block < args.samples * chunks; block += gridDim.x) {
    const HeadChunk chunk(block, chunks, n);
    const int64_t offset = chunk.sample * kOutputs * n;
    T sum = T(0);
    for (int64_t j = chunk.first + threadIdx.x; j < chunk.end; j += blockDim.x) {
      T y[kOutputs], r[kOutputs];
      for (int i = 0; i < kOutputs; ++i) {
        y[i] = args.y[offset + i * n + j];
      }
      const T w = args.weight == nullptr ? T(1) : args.weight[chunk.sample * n + j];
      const T log_prob = rules.first(y, args.x[chunk.sample * n + j], r);
      sum += w == T(0) ? T(0) : w * log_prob;
      for (int i = 0; i < kOutputs && args.residual != nullptr; ++i) {
        args.residual[offset + i * n + j] = w == T(0) ? T(0) : w * r[i];
      }
    }
    note_log_prob(args, block, sum);
  }
}

template <typename Rules, typename T>
__global__ void element_tangent_kernel(const ElementHeadTangent<T> args, const Rules rules, int64_t chunks) {
  constexpr int kOutputs = Rules::kOutputs;
  const int64_t n = args.size;
  for (int64_t block = blockIdx.x; block < args.samples * chunks; block += gridDim.x) {
    const HeadChunk chunk(block, chunks, n);
    const int64_t offset = chunk.sample * kOutputs * n;
    const T c = args.cotangent == nullptr ? T(0) : args.cotangent[chunk.sample];
    for (int64_t j = chunk.first + threadIdx.x; j < chunk.end; j += blockDim.x) {
      T y[kOutputs], v[kOutputs], bent[kOutputs];
      for (int i = 0; i < kOutputs; ++i) {
        y[i] = args.y[offset + i * n + j];
        v[i] = args.dot[offset + i * n + j];
      }
      const T w = args.weight == nullptr ? T(1) : args.weight[chunk.sample * n + j];
      rules.second(y, args.x[chunk.sample * n + j], v, bent);
      for (int i = 0; i < kOutputs; ++i) {
        const int64_t at = offset + i * n + j;
        const T of_value = args.cotangent == nullptr ? T(0) : c * args.residual[at];
        args.delta_dot[at] = (w == T(0) ? T(0) : w * bent[i]) + of_value;
      }
    }
  }
}

#define FASTVAE_CASE(NAME, KERNEL, KIND, Rules)                                                       \
  case ElementHead::KIND:                                                                             \
    launch(NAME, KERNEL<Rules<T>, T>, grid, stream, args, Rules<T>(args.likelihood.numbers), chunks); \
    break;
#define FASTVAE_RESIDUAL_CASE(KIND, Rules) FASTVAE_CASE("element_head_residual", element_residual_kernel, KIND, Rules)
#define FASTVAE_TANGENT_CASE(KIND, Rules) FASTVAE_CASE("element_head_tangent", element_tangent_kernel, KIND, Rules)

template <typename T>
void element_head_residual_launch(const ElementHeadResidual<T>& args, Stream stream) {
  const int64_t chunks = args.log_prob == nullptr  ? unsummed_chunks(args.size)
                         : args.partial == nullptr ? 1
                                                   : element_head_chunks(args.size);
  const Grid grid{args.samples * chunks};
  switch (args.likelihood.kind) { FASTVAE_ELEMENT_HEADS(FASTVAE_RESIDUAL_CASE) }
  if (args.log_prob != nullptr && args.partial != nullptr) {
    sum_chunks<T>(args.partial, args.log_prob, args.samples, chunks, 1, stream);
  }
}

template <typename T>
void element_head_tangent_launch(const ElementHeadTangent<T>& args, Stream stream) {
  const int64_t chunks = unsummed_chunks(args.size);
  const Grid grid{args.samples * chunks};
  switch (args.likelihood.kind) { FASTVAE_ELEMENT_HEADS(FASTVAE_TANGENT_CASE) }
}

#undef FASTVAE_TANGENT_CASE
#undef FASTVAE_RESIDUAL_CASE
#undef FASTVAE_CASE

FASTVAE_DEFINE_CUDA(element_head_residual, ElementHeadResidual)
FASTVAE_DEFINE_CUDA(element_head_tangent, ElementHeadTangent)

}  // namespace fastvae::cuda
