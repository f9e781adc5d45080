// The whole test framework: CHECK counts and prints what failed, finish() is what main returns.
#pragma once

#include <cstdio>

namespace check {

inline int checks = 0;
inline int failures = 0;

template <typename... Values>
void that(bool condition, const char* file, int line, const char* format, Values... values) {
  ++checks;
  if (condition) {
    return;
  }
  if (++failures <= 50) {
    std::printf("%s:%d: ", file, line);
    std::printf(format, values...);
    std::printf("\n");
  }
}

inline int finish(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(CONDITION, ...) ::check::that(CONDITION, __FILE__, __LINE__, __VA_ARGS__)
