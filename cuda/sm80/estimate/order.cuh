// Floats as integers of the same order, and 4-bit codes as bytes: shared by the estimators.
#pragma once

#include <cstdint>

#include "cuda/common/numeric.cuh"

namespace attnsieve::sm80 {

// Integers in the order of floats, NaN above all; and back.
__device__ __forceinline__ int32_t float_order(float x) {
  const int32_t bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_order(int32_t order) {
  return __int_as_float(order ^ (order >> 31 & 0x7fffffff));
}

// Codes of 4 bits become bytes that hold 16 times as much.
__device__ __forceinline__ uint32_t upper_codes(uint32_t bytes) { return bytes & 0xf0f0f0f0u; }
__device__ __forceinline__ uint32_t lower_codes(uint32_t bytes) { return bytes << 4 & 0xf0f0f0f0u; }

// Codes of 4 bits become bytes of the same value.
__device__ __forceinline__ uint32_t signed_codes(uint32_t nibbles) {
  return (((nibbles & 0x0f0f0f0fu) ^ 0x08080808u) + 0x78787878u) ^ 0x80808080u;
}

// Two results of blocks, and that of none: maxima in the order above, or the bits of sums.
template <bool kSum>
__device__ __forceinline__ int32_t joined(int32_t a, int32_t b) {
  if constexpr (!kSum) return max(a, b);
  return __float_as_int(__int_as_float(a) + __int_as_float(b));
}
template <bool kSum>
__device__ __forceinline__ int32_t nothing() {
  return kSum ? __float_as_int(0.0f) : float_order(negative_infinity());
}

}  // namespace attnsieve::sm80
