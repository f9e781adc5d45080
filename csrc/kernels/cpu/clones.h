// One binary for every x86-64: the loader picks the clone for the machine. Each kernel has a plain function with
// this attribute that inlines a template; templates themselves cannot carry it.
#pragma once

// Levels, not processor names: a clone for "skylake-avx512" is not chosen on its successors.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(FASTVAE_NO_CLONES)
#define FASTVAE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTVAE_CLONES
#endif

// For kernels whose blocks fill 32 registers of 512 bits: called where kWideRegisters says that there are that many.
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTVAE_WIDE __attribute__((target("arch=x86-64-v4")))
#else
#define FASTVAE_WIDE
#endif

#define FASTVAE_INLINE inline __attribute__((always_inline))
#define FASTVAE_LAMBDA_INLINE __attribute__((always_inline))

// Defines the float and the double kernel of kernels.h from one template.
#define FASTVAE_DEFINE_CPU(NAME, ARGS)                                                                                 \
  FASTVAE_CLONES void NAME(const ARGS<float>& args, int64_t begin, int64_t end) { NAME##_template(args, begin, end); } \
  FASTVAE_CLONES void NAME(const ARGS<double>& args, int64_t begin, int64_t end) { NAME##_template(args, begin, end); }
