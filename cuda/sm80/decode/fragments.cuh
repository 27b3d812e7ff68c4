// From shared memory to MMA operands: rows of K, and columns of V as rows of V^T.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "cuda/common/float8.cuh"
#include "cuda/sm80/decode/config.h"

namespace attnsieve::sm80 {

template <class Element>
using DecodeMma =
    std::conditional_t<std::is_same_v<Element, cute::bfloat16_t>,
                       cute::SM80_16x8x16_F32BF16BF16F32_TN, cute::SM80_16x8x16_F32F16F16F32_TN>;

template <class Element>
__device__ __forceinline__ void decode_mma(float (&d)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[2]) {
  DecodeMma<Element>::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1],
                          d[2], d[3]);
}

// A operand of S^T = K Q^T: 16 keys x dimensions [16 step, 16 step + 16) of a tile of K.
template <class Config>
__device__ __forceinline__ void load_keys(const typename Config::Stored* tile, int step, int lane,
                                          uint32_t (&keys)[4]) {
  using Element = typename Config::Element;
  if constexpr (Config::kCodes) {
    const auto* source = tile + Config::offset(lane % 16, step);
    uint32_t codes[2];  // of keys lane / 4 and + 8
    cute::SM75_U32x2_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(source), codes[0],
                                  codes[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keys[i] = widen_e4m3x2<Element>(codes[i % 2] >> i / 2 * 16 & 0xffffu);
    }
  } else {
    const auto* source = tile + Config::offset(lane % 16, step * 2 + lane / 16);
    cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(source), keys[0],
                                  keys[1], keys[2], keys[3]);
  }
}

// A operand of O^T = V^T P^T: 16 dimensions x 16 keys.
template <class Config>
__device__ __forceinline__ void load_values(const typename Config::Stored* tile, int step, int lane,
                                            uint32_t (&values)[4]) {
  using Element = typename Config::Element;
  if constexpr (Config::kCodes) {
    const auto* source = tile + Config::offset(lane % 16, step);
    uint32_t codes[2];  // a key's pair of dimensions, and the next key's; then 8 keys on
    cute::SM75_U16x4_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(source), codes[0],
                                  codes[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = __byte_perm(codes[i / 2], 0, i % 2 == 0 ? 0x4420 : 0x4431);
      values[i] = widen_e4m3x2<Element>(pair);
    }
  } else {
    const auto* source = tile + Config::offset(lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2);
    cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(source), values[0],
                                  values[1], values[2], values[3]);
  }
}

}  // namespace attnsieve::sm80
