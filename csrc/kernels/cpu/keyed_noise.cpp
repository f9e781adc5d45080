// Keys of samples and numbers of keys (keyed_noise.h and math/splitmix.h give the formulas).
//
// Cost: a sample's bytes once, with one integer product a word; a normal number 3 integer products and about 60 FLOPs.
#include <algorithm>
#include <cstring>

#include "../kernels.h"
#include "../math/splitmix.h"
#include "clones.h"

namespace fastvae::cpu {

// The multipliers of so many words are computed once for all samples of a range, and stay in L1.
constexpr int64_t kBlockWords = 512;

FASTVAE_INLINE uint64_t hash_of_words(const unsigned char* bytes, const uint64_t* multipliers, int64_t words) {
  uint64_t sum = 0;
  for (int64_t w = 0; w < words; ++w) {
    uint64_t word;
    std::memcpy(&word, bytes + 8 * w, 8);  // a row of bytes need not be aligned
    sum += math::hash_fold(word) * multipliers[w];
  }
  return sum;
}

FASTVAE_INLINE void sample_keys_template(const SampleKeys& args, int64_t begin, int64_t end) {
  const int64_t words = args.row_bytes / 8, rest = args.row_bytes % 8;
  std::fill(args.keys + begin, args.keys + end, 0);
  for (int64_t first = 0; first < words; first += kBlockWords) {
    const int64_t count = std::min(kBlockWords, words - first);
    uint64_t multipliers[kBlockWords];
    for (int64_t w = 0; w < count; ++w) {
      multipliers[w] = math::hash_multiplier(static_cast<uint64_t>(first + w));
    }
    for (int64_t sample = begin; sample < end; ++sample) {
      args.keys[sample] += hash_of_words(args.bytes + sample * args.row_bytes + 8 * first, multipliers, count);
    }
  }
  for (int64_t sample = begin; sample < end; ++sample) {
    uint64_t sum = args.keys[sample];
    if (rest > 0) {
      uint64_t word = 0;
      std::memcpy(&word, args.bytes + sample * args.row_bytes + 8 * words, static_cast<size_t>(rest));
      sum += math::hash_fold(word) * math::hash_multiplier(static_cast<uint64_t>(words));
    }
    args.keys[sample] = math::mix(sum + 8 * static_cast<uint64_t>(words + (rest > 0)));
  }
}

FASTVAE_INLINE void keyed_numbers_template(const KeyedNumbers& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint64_t key = args.keys[row];
    if (args.bits != nullptr) {
      uint64_t* const bits = args.bits + row * args.count;
      for (int64_t j = 0; j < args.count; ++j) {
        bits[j] = math::keyed_bits(key, args.first + static_cast<uint64_t>(j));
      }
    } else {
      double* const normal = args.normal + row * args.count;
      for (int64_t j = 0; j < args.count; ++j) {
        normal[j] = math::normal(math::keyed_bits(key, args.first + static_cast<uint64_t>(j)));
      }
    }
  }
}

FASTVAE_CLONES void sample_keys(const SampleKeys& args, int64_t begin, int64_t end) {
  sample_keys_template(args, begin, end);
}

FASTVAE_CLONES void keyed_numbers(const KeyedNumbers& args, int64_t begin, int64_t end) {
  keyed_numbers_template(args, begin, end);
}

}  // namespace fastvae::cpu
