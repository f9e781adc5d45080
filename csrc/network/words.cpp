#include "words.h"

#include <charconv>
#include <cmath>
#include <system_error>

#include "../common/check.h"

namespace fastvae {
namespace {

template <typename Number>
bool read(std::string_view word, Number& value) {
  const char* const end = word.data() + word.size();
  const std::from_chars_result found = std::from_chars(word.data(), end, value);
  return found.ec == std::errc() && found.ptr == end;
}

std::string quoted(std::string_view word) { return "'" + std::string(word) + "'"; }

}  // namespace

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  size_t start = 0;
  while (start <= text.size()) {
    size_t end = text.find(separator, start);
    end = end == std::string_view::npos ? text.size() : end;
    if (end > start) {
      parts.emplace_back(text.substr(start, end - start));
    }
    start = end + 1;
  }
  return parts;
}

double to_number(const char* op, const char* argument, std::string_view word) {
  double value = 0.0;
  FASTVAE_CHECK_VALUE(read(word, value) && std::isfinite(value), op, argument, "a number", quoted(word));
  return value;
}

int64_t to_integer(const char* op, const char* argument, std::string_view word) {
  int64_t value = 0;
  FASTVAE_CHECK_VALUE(read(word, value), op, argument, "an integer", quoted(word));
  return value;
}

}  // namespace fastvae
