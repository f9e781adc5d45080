// Random numbers that depend on a key and a counter alone, and keys that depend on a sample's bytes: arguments, as in
// kernels.h, which includes this file. Integers and float64 whatever the samples are; math/splitmix.h has the formulas.
#pragma once

#include <cstdint>

namespace fastvae {

// keys = mix(sum_w hash_fold(word_w) hash_multiplier(w) + 8 words) over a sample's words of 8 bytes, the last one
// filled up with zeros. Index: samples.
struct SampleKeys {
  const unsigned char* bytes;  // [samples, row_bytes]; CUDA: aligned to 8, and row_bytes a multiple of it
  uint64_t* keys;              // [samples]
  int64_t samples;
  int64_t row_bytes;
};

// keyed_bits(key, first + j), j = 0 .. count - 1, or normal numbers from them. Index: rows.
struct KeyedNumbers {
  const uint64_t* keys;  // [rows]
  uint64_t* bits;        // [rows, count] or null
  double* normal;        // [rows, count], null where bits is not
  int64_t rows;
  int64_t count;
  uint64_t first;
};

}  // namespace fastvae
