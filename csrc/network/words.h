// The words of a network's or a likelihood's text, and numbers read from them in the same way under every locale.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fastvae {

// The parts between separators that are not empty.
std::vector<std::string> split(std::string_view text, char separator);

// ValueError unless the whole word is one finite number, or one integer of 64 bits.
double to_number(const char* op, const char* argument, std::string_view word);
int64_t to_integer(const char* op, const char* argument, std::string_view word);

}  // namespace fastvae
