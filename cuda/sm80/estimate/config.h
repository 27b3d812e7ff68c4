// Sizes of the estimator's tiles, and the addresses of their shared memory.
#pragma once

#include <cstdint>

#include "attnsieve/estimate.h"

namespace attnsieve::sm80 {

// Codes of keys lie in shared memory as bytes, also where they are stored in 4 bits.
template <int kHeadDim_, int kKeyBits_, bool kSum_>
struct EstimateConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeyBits = kKeyBits_;
  static constexpr bool kSum = kSum_;  // exponentials are summed, instead of maxima
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  // Of 16 rows, in registers: what they leave decides.
  static constexpr int kFragments = kHeadDim > 128 ? 2 : 4;
  static constexpr int kWarpRows = kFragments * 16;
  static constexpr int kRows = kWarps * kWarpRows;  // sampled query rows of a CTA
  static constexpr int kTileKeys = 128;
  static constexpr int kUnitKeys = 16;  // what block_k is a multiple of
  static constexpr int kUnits = kTileKeys / kUnitKeys;
  static constexpr int kStages = 2;
  static constexpr int kMostBlocks = kWarpRows / 8;  // q-blocks of a warp: every 8th of 64 rows
  static constexpr int kMostScales = 16;             // of a tile of keys
  static constexpr int kSteps = kHeadDim / 32;       // of an MMA
  static constexpr int kChunks = kHeadDim / 16;      // of a row, 16 bytes each
  static constexpr int kStageBytes = kTileKeys * kHeadDim;
  static constexpr int kPieces = kTileKeys * kSteps;  // 32 codes each, of a tile
  // Whether codes of 4 bits wait in registers while a tile is scored: where there are enough.
  static constexpr bool kPrefetch = kHeadDim < 128;
  static constexpr int kThreadPieces = (kPieces + kThreads - 1) / kThreads;

  struct SharedStorage {
    alignas(128) int8_t keys[kStages][kStageBytes];
    float scales[kStages][kMostScales];
    // Maxima as ordered integers (order.cuh), or sums as floats.
    int32_t best[kStages][kWarps][kMostBlocks][kUnits];
    uint32_t words[kWarps * kMostBlocks];  // bits of each q-block, under way
    EstimateSequence sequence;
  };

  // Of a row's chunk: swizzled so that eight rows at one chunk lie in different banks.
  static __device__ int offset(int row, int chunk) {
    const int swizzle = kHeadDim == 64 ? row / 2 % 4 : kHeadDim == 96 ? 0 : row % 8;
    return row * kHeadDim + (chunk ^ swizzle) * 16;
  }
};

}  // namespace attnsieve::sm80
