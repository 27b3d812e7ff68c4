// The order in which scores rank, as integers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace attnsieve::cpu {

// Larger is better: NaN below -inf, -0 equal to 0.
inline uint32_t score_order(float score) {
  if (std::isnan(score)) return 0;
  score += 0.0f;  // -0 becomes 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
}

}  // namespace attnsieve::cpu
