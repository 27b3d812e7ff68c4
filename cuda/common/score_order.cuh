// The order in which scores rank, as integers.
#pragma once

#include <cstdint>

namespace attnsieve {

// Larger is better: NaN below -inf, -0 equal to +0.
__device__ __forceinline__ uint32_t score_order(float score) {
  if (score != score) return 0;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

}  // namespace attnsieve
