// The whole test framework: CHECK(condition) counts, finish() prints and gives main's return value;
// contains() looks into an error's text.
#pragma once

#include <cstdio>
#include <string>

namespace check {

inline int passed = 0;
inline int failed = 0;
inline std::string context;  // what the current case is; printed with every failure

inline void record(bool ok, const char* text, const char* file, int line) {
  if (ok) {
    ++passed;
    return;
  }
  ++failed;
  constexpr int kShown = 20;
  if (failed <= kShown) std::printf("%s:%d: failed: %s [%s]\n", file, line, text, context.c_str());
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline int finish() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) check::record((condition), #condition, __FILE__, __LINE__)
