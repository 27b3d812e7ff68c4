// In a tile where some row does not see some key, 0 * NaN would carry a NaN or Inf of V into rows
// that must not see it. A warp of the producers looks for such values while the tile waits;
// where there are any, they are added to the rows that see them and replaced by zero for the MMA.
#pragma once

#include "cuda/sm90/attend/config.h"

namespace attnsieve::sm90 {

template <class Element>
__device__ __forceinline__ bool is_non_finite(uint32_t bits16) {
  constexpr uint32_t kExponent = std::is_same_v<Element, cute::bfloat16_t> ? 0x7f80u : 0x7c00u;
  return (bits16 & kExponent) == kExponent;
}

// Whether this thread's share, of kThreads, of a V stage holds a NaN or Inf. The largest magnitude
// tells: they have the largest exponents.
template <class Config, int kThreads>
__device__ bool holds_non_finite(const typename Config::SharedStorage& smem, int stage,
                                 int thread) {
  using Element = typename Config::Element;
  constexpr int kChunks = Config::kTileBytes / 16 / kThreads;  // of 16 bytes
  const auto* chunks =
      reinterpret_cast<const uint4*>(smem.v + stage * Config::kTileElements) + thread;
  uint32_t largest = 0;  // of each half of a word
#pragma unroll kThreads == kWarpThreads ? 8 : 1
  for (int i = 0; i < kChunks; ++i) {
    const uint4 chunk = chunks[i * kThreads];
    for (uint32_t word : {chunk.x, chunk.y, chunk.z, chunk.w}) {
      largest = __vmaxu2(largest, word & 0x7fff7fffu);
    }
  }
  return is_non_finite<Element>(largest & 0xffffu) || is_non_finite<Element>(largest >> 16);
}

// The checking warp.
template <class Config>
__device__ void check_values(typename Config::SharedStorage& smem) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  RingPosition<Config::kCheckSlots> position(0);
  while (true) {
    smem.check_full[position.slot].wait_idle(position.phase);
    const typename Config::CheckRequest request = smem.check[position.slot];
    if (request.stage >= Config::kStagesV) return;
    smem.v_full[request.slot].wait(request.parity);
    const bool found =
        __any_sync(0xffffffffu, holds_non_finite<Config, kWarpThreads>(smem, request.stage, lane));
    if (lane == 0) {
      if (found) smem.check[position.slot].non_finite = 1;
      smem.check_done[position.slot].arrive();
    }
    position.advance();
  }
}

// Adds the non-finite values of a V stage to the rows of acc_o, a ((2, 2, columns), 1, 1) fragment,
// that see their keys. `rows` are the two query rows of this thread.
template <class Config, class FragmentO>
__device__ void add_non_finite(const typename Config::SharedStorage& smem, int stage,
                               const Work& work, const int (&rows)[2], FragmentO& acc_o) {
  using Element = typename Config::Element;
  constexpr int kSliceChunks = Config::kSliceColumns / 8;
  const Element* tile = smem.v + stage * Config::kTileElements;
#pragma unroll
  for (int slice = 0; slice < Config::kSlices; ++slice) {  // outermost: few values in flight
#pragma unroll 1
    for (int key = 0; key < Config::kTileN; ++key) {
      // Opaque, or the addresses of all columns would be formed ahead and live through the main
      // loop.
      int lane = static_cast<int>(threadIdx.x) % 4;
      asm volatile("" : "+r"(lane));
      const int position = smem.v_record[stage].key[key / Config::kGranuleKeys];
      if (position < 0 || position == Config::kNoKey) continue;
      const int key_position = position + key % Config::kGranuleKeys;
      bool sees[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        sees[row] =
            key_position >= work.first_key(rows[row]) && key_position < work.end_key(rows[row]);
      }
#pragma unroll
      for (int i = 0; i < kSliceChunks; ++i) {
        const int chunk = slice * kSliceChunks + i;
        const int offset =
            Config::offset_in_tile(key, chunk * 8, Config::kTileN, Config::kInterleaved);
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(tile + offset + lane * 2);
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const auto bits = static_cast<uint16_t>(pair >> 16 * column);
          if (!is_non_finite<Element>(bits)) continue;
          const float value = static_cast<float>(Element::bitcast(bits));
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            if (sees[row]) acc_o(chunk * 4 + row * 2 + column) += value;
          }
        }
      }
    }
  }
}

// Every consumer thread takes part; barriers before and after are the caller's.
template <class Config>
__device__ void zero_non_finite(typename Config::SharedStorage& smem, int stage) {
  using Element = typename Config::Element;
  auto* words = reinterpret_cast<uint32_t*>(smem.v + stage * Config::kTileElements);
#pragma unroll 1
  for (int i = threadIdx.x; i < Config::kTileBytes / 4; i += Config::kConsumerThreads) {
    uint32_t word = words[i];
    if (is_non_finite<Element>(word & 0xffffu)) word &= 0xffff0000u;
    if (is_non_finite<Element>(word >> 16)) word &= 0x0000ffffu;
    words[i] = word;
  }
}

}  // namespace attnsieve::sm90
