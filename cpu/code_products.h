// Products of 8-bit codes by integer dot products, where the machine has them.
#pragma once

#include <cstdint>

#include "attnsieve/launch.h"

namespace attnsieve::cpu {

inline constexpr int kCodePitch = 64;  // rows of codes are padded with zeros to a multiple of this

struct CodeProducts {
  // s[key][column] = the product of a key's codes with a column's, exact; rows of s are kColumns
  // apart. `queries`: [pitch / 4][kColumns][4] of codes + 128; `keys`: [count][pitch]. `columns`: a
  // multiple of 16.
  void (*products)(const uint8_t* queries, const int8_t* keys, int count, int pitch, int columns,
                   float* s);
  // `count` codes of 4 bits, a multiple of 32, as bytes.
  void (*unpack)(const char* row, int64_t count, int8_t* codes);
};

// nullptr where the machine or the build has none.
const CodeProducts* code_products();

// With these, or in float32 for nullptr: the same numbers.
void estimate_block_scores(const EstimateProblem& problem, const ParallelFor& parallel_for,
                           const CodeProducts* integers);

}  // namespace attnsieve::cpu
