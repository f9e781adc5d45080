// Arguments of the kernels of keyed_noise.h: rows of bytes that fill no word, more words than a block has, many rows.
#pragma once

#include <random>
#include <vector>

#include "kernels.h"

namespace cases {

struct Noise {
  std::vector<unsigned char> bytes;
  std::vector<uint64_t> keys, bits;
  std::vector<double> normal;
};

inline Noise noise_case(int64_t samples, int64_t row_bytes, int64_t count) {
  Noise noise;
  std::mt19937_64 random(11);
  noise.bytes.resize(static_cast<size_t>(samples * row_bytes));
  for (unsigned char& byte : noise.bytes) {
    byte = static_cast<unsigned char>(random());
  }
  noise.keys.resize(static_cast<size_t>(samples));
  noise.bits.resize(static_cast<size_t>(samples * count));
  noise.normal.resize(noise.bits.size());
  return noise;
}

// run(args) for the keys of the bytes, then for the numbers first .. first + count - 1 of each of them.
template <typename Run>
void fill(Noise& noise, int64_t samples, int64_t row_bytes, int64_t count, uint64_t first, const Run& run) {
  run(fastvae::SampleKeys{noise.bytes.data(), noise.keys.data(), samples, row_bytes});
  run(fastvae::KeyedNumbers{noise.keys.data(), noise.bits.data(), nullptr, samples, count, first});
  run(fastvae::KeyedNumbers{noise.keys.data(), nullptr, noise.normal.data(), samples, count, first});
}

// calls(samples, row_bytes, count, first)
template <typename Call>
void for_each_noise(bool whole_words, const Call& call) {
  call(1, 8, 1, uint64_t{0});
  call(5, 24, 7, ~uint64_t{0});
  call(301, 16, 3, uint64_t{5});
  call(3, 8 * 1300, 67, uint64_t{1} << 40);
  if (!whole_words) {
    call(4, 1, 2, uint64_t{0});
    call(7, 8 * 513 + 3, 5, uint64_t{2});
  }
}

}  // namespace cases
