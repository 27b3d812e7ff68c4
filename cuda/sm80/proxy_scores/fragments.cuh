// Pieces of rows as operands of the 16-bit MMA. A piece is 8 elements that lie side by side; four
// lanes hold the pieces of 32 elements, and both operands take the elements in the same order, which
// is not the MMA's: so every load is one of 16 bytes, and none goes through shared memory.
#pragma once

#include <cuda_fp8.h>

#include <cute/arch/mma_sm80.hpp>

#include "cuda/sm80/proxy_scores/units.cuh"

namespace attnsieve::sm80 {

template <class Element>
struct Paired;

template <>
struct Paired<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;
  static __device__ Type from_floats(float a, float b) { return __floats2bfloat162_rn(a, b); }
};

template <>
struct Paired<__half> {
  using Type = __half2;
  using Mma = cute::SM80_16x8x16_F32F16F16F32_TN;
  static __device__ Type from_floats(float a, float b) { return __floats2half2_rn(a, b); }
};

__device__ __forceinline__ uint4 no_piece() { return make_uint4(0, 0, 0, 0); }

// products = units x vectors over 32 elements: rows lane / 4 of `low` and `high` are units lane / 4
// and + 8, rows of `vectors` query vectors. Tensor cores drop low bits of their smaller terms, always
// towards zero: what exceeds one MMA is added up outside.
template <class Element>
__device__ __forceinline__ void multiply_pieces(const uint4& low, const uint4& high,
                                                const uint4& vectors, float (&products)[4]) {
  using Mma = typename Paired<Element>::Mma;
  float d[2][4] = {};
  Mma::fma(d[0][0], d[0][1], d[0][2], d[0][3], low.x, high.x, low.y, high.y, vectors.x, vectors.y,
           d[0][0], d[0][1], d[0][2], d[0][3]);
  Mma::fma(d[1][0], d[1][1], d[1][2], d[1][3], low.z, high.z, low.w, high.w, vectors.z, vectors.w,
           d[1][0], d[1][1], d[1][2], d[1][3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) products[i] = d[0][i] + d[1][i];
}

// The part of a query vector that meets the minima (side 0) or the maxima (side 1) of a page. NaN
// is in both.
template <class Element>
__device__ __forceinline__ uint32_t part_of(uint32_t pair, int side) {
  using Pair = typename Paired<Element>::Type;
  const Pair x = *reinterpret_cast<const Pair*>(&pair);
  const Pair zero = Paired<Element>::from_floats(0.0f, 0.0f);
  const Pair part = side == 0 ? __hmin2_nan(x, zero) : __hmax2_nan(x, zero);
  return *reinterpret_cast<const uint32_t*>(&part);
}

template <class Element>
__device__ __forceinline__ uint4 part_of(const uint4& piece, int side) {
  return make_uint4(part_of<Element>(piece.x, side), part_of<Element>(piece.y, side),
                    part_of<Element>(piece.z, side), part_of<Element>(piece.w, side));
}

__device__ __forceinline__ float number_of(Code code, uint32_t byte) {
  if (code == Code::kInt8) return static_cast<float>(static_cast<int8_t>(byte));
  return __half2float(
      __half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte), __NV_E4M3)));
}

// Eight codes that lie side by side, the first in the low byte.
__device__ __forceinline__ uint2 load_codes(const ProxyScoresArguments& a, int64_t offset) {
  const auto* source = static_cast<const uint8_t*>(a.problem.keys.data) + offset;
  if (a.aligned_codes) return __ldg(reinterpret_cast<const uint2*>(source));
  uint2 codes = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    codes.x |= static_cast<uint32_t>(source[i]) << (8 * i);
    codes.y |= static_cast<uint32_t>(source[4 + i]) << (8 * i);
  }
  return codes;
}

// Codes are numbers of every 16-bit type: nothing is rounded.
template <class Element>
__device__ __forceinline__ uint32_t widen_pair(Code code, uint32_t codes, int first) {
  const auto pair = Paired<Element>::from_floats(number_of(code, codes >> (8 * first) & 0xff),
                                                 number_of(code, codes >> (8 * first + 8) & 0xff));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A piece of the keys, `offset` in elements.
template <class Element>
__device__ __forceinline__ uint4 load_key_piece(const ProxyScoresArguments& a, int64_t offset) {
  const ProxyScoresProblem& p = a.problem;
  if (p.key_code == Code::kNone) {
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const Element*>(p.keys.data) + offset));
  }
  const uint2 codes = load_codes(a, offset);
  return make_uint4(
      widen_pair<Element>(p.key_code, codes.x, 0), widen_pair<Element>(p.key_code, codes.x, 2),
      widen_pair<Element>(p.key_code, codes.y, 0), widen_pair<Element>(p.key_code, codes.y, 2));
}

}  // namespace attnsieve::sm80
