// Tiles of 64 rows between global memory and swizzled shared memory, 16 bytes a thread and pass.
#pragma once

#include "cuda/common/ptx_sm80.cuh"
#include "cuda/sm80/attend/config.h"

namespace attnsieve::sm80 {

template <class Config>
class TileCopy {
  using Element = typename Config::Element;
  static constexpr int kRows = kUnitKeys;
  static constexpr int kVector = 16 / sizeof(Element);
  static constexpr int kChunks = Config::kHeadDim / kVector;  // 16-byte chunks of a row
  static constexpr int kRowsPerPass = Config::kThreads / kChunks;
  static constexpr int kPasses = kRows / kRowsPerPass;
  static_assert(Config::kTileM == kRows, "one copy shape serves Q, K, V and the output");

 public:
  __device__ TileCopy() : row_(threadIdx.x / kChunks), column_(threadIdx.x % kChunks * kVector) {}

  // Starts the copy of rows [0, valid_rows) of a tile, or of its first kCopied rows; the other rows
  // become zero.
  template <int kCopied = kRows>
  __device__ void load(Element* smem, const Element* gmem, int64_t stride_row,
                       int valid_rows) const {
    static_assert(kCopied % kRowsPerPass == 0);
    const Element* source = gmem + row_ * stride_row + column_;
    Element* const targets[2] = {element(smem, 0), element(smem, 1)};
#pragma unroll
    for (int pass = 0; pass < kCopied / kRowsPerPass; ++pass) {
      cp_async_16_or_zero(targets[pass % 2] + pass / 2 * kPairStride, source,
                          row_ + pass * kRowsPerPass < valid_rows);
      source += kRowsPerPass * stride_row;
    }
  }

  // Rows from `row` on, a multiple of 8: where the swizzle starts again.
  static __device__ Element* rows_from(Element* smem, int row) { return smem + row * 64; }

  // Writes rows [0, valid_rows) of a shared tile to global memory.
  __device__ void store(Element* gmem, Element* smem, int64_t stride_row, int valid_rows) const {
    Element* target = gmem + row_ * stride_row + column_;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (row_ + pass * kRowsPerPass < valid_rows) {
        *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(element(smem, pass));
      }
      target += kRowsPerPass * stride_row;
    }
  }

  // True if one of this thread's elements of a shared tile is NaN or infinite.
  __device__ bool any_non_finite(Element* smem) const {
    bool found = false;
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(element(smem, pass));
      found |= is_non_finite_pair(chunk.x) || is_non_finite_pair(chunk.y) ||
               is_non_finite_pair(chunk.z) || is_non_finite_pair(chunk.w);
    }
    return found;
  }

  __device__ void zero_non_finite(Element* smem) const {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      auto* words = reinterpret_cast<uint32_t*>(element(smem, pass));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (is_non_finite(words[i] & 0xffffu)) words[i] &= 0xffff0000u;
        if (is_non_finite(words[i] >> 16)) words[i] &= 0x0000ffffu;
      }
    }
  }

  static __device__ bool is_non_finite_pair(uint32_t word) {
    return is_non_finite(word & 0xffffu) || is_non_finite(word >> 16);
  }

  static __device__ bool is_non_finite(uint32_t bits16) {
    constexpr uint32_t kExponent = std::is_same_v<Element, cute::bfloat16_t> ? 0x7f80u : 0x7c00u;
    return (bits16 & kExponent) == kExponent;
  }

 private:
  // The swizzle repeats every 8 rows, which two passes always complete.
  static constexpr int kPairStride = 2 * kRowsPerPass * 64;
  static_assert(2 * kRowsPerPass % 8 == 0);

  // This thread's 16-byte chunk of a pass.
  __device__ Element* element(Element* smem, int pass) const {
    auto tile = cute::make_tensor(cute::make_smem_ptr(smem), typename Config::SmemLayoutUnit{});
    return &tile(row_ + pass * kRowsPerPass, column_);
  }

  int row_;
  int column_;
};

}  // namespace attnsieve::sm80
