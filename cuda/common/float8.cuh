// float8 e4m3 codes to 16-bit elements.
#pragma once

#include <cuda_fp8.h>

#include <cute/numeric/numeric_types.hpp>

#include "cuda/common/numeric.cuh"

namespace attnsieve {

// Two codes, the first in the low byte, to two elements. Exact; NaN stays NaN.
template <class Element>
__device__ __forceinline__ uint32_t widen_e4m3x2(uint32_t codes);

template <>
__device__ __forceinline__ uint32_t widen_e4m3x2<cute::half_t>(uint32_t codes) {
  const __half2_raw pair =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return static_cast<uint32_t>(pair.x) | static_cast<uint32_t>(pair.y) << 16;
}

template <>
__device__ __forceinline__ uint32_t widen_e4m3x2<cute::bfloat16_t>(uint32_t codes) {
  const __half2 halves(
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3));
  const __nv_bfloat162 pair = __float22bfloat162_rn(__half22float2(halves));
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace attnsieve
