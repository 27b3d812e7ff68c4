// Sizes and shared-memory layout of the decode kernel, and how its MMA fragments map to dimensions.
#pragma once

#include <cute/numeric/numeric_types.hpp>
#include <type_traits>

#include "cuda/common/numeric.cuh"

namespace attnsieve::sm80 {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpThreads;
inline constexpr int kDecodeStages = 2;
inline constexpr int kDecodeCtasPerSm = 2;  // of the kernel for every problem
inline constexpr int kTileKeys = 16;
inline constexpr int kTileColumns = 8;

// Element of q and out, and what the caches store: the same, or float8_e4m3_t codes.
template <class Element_, class Stored_>
struct DecodeTypes {
  using Element = Element_;
  using Stored = Stored_;
};

template <class Types, int kHeadDim_, int kColumnTiles_>
struct DecodeConfig {
  using Element = typename Types::Element;
  using Stored = typename Types::Stored;
  static constexpr bool kCodes = sizeof(Stored) == 1;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kColumnTiles = kColumnTiles_;  // of 8 query vectors
  static constexpr int kColumns = kColumnTiles * kTileColumns;
  static constexpr int kSteps = kHeadDim / 16;  // of an MMA over dimensions
  static constexpr int kChunkElements = 16 / static_cast<int>(sizeof(Stored));
  // Of lists; registers for a wider output leave room for fewer.
  static constexpr int kCtasPerSm = kHeadDim * kColumns > 1024 ? 2 : 3;
  static constexpr int kQuads = kHeadDim / 4;  // of dimensions
  static constexpr int kMergeTurns = kColumns * kQuads / kDecodeThreads;  // of all threads
  // A CTA merges groups of chunks: a wider output leaves no registers for that.
  static constexpr bool kMergesGroups = kMergeTurns <= 2;
  static constexpr int kRowChunks = kHeadDim / kChunkElements;  // of 16 bytes

  struct Stage {
    alignas(128) Stored k[kTileKeys * kHeadDim];
    alignas(128) Stored v[kTileKeys * kHeadDim];
    int position[kTileKeys];
  };
  // What a warp leaves for the others.
  struct Merge {
    // The gap keeps the lanes that store a fragment on banks of their own.
    alignas(16) float out[kColumns][kHeadDim + 4];
    float max[kColumns];
    float sum[kColumns];
  };
  struct Stages {
    Stage stage[kDecodeStages];
  };

  // Element offset of a 16-byte chunk in a tile: conflict-free for cp.async and ldmatrix.
  static __device__ int offset(int row, int chunk) {
    static_assert(kRowChunks >= 4);
    const int swizzle = kRowChunks == 4 ? row / 2 % 4 : row % 8;
    return row * kHeadDim + (chunk ^ swizzle) * kChunkElements;
  }

  // First of the two dimensions that register `half` of a query fragment holds, for a lane that is
  // `in_quad` of its quad. With codes a lane's four codes of a row are its four of the fragment.
  static __device__ int query_dim(int step, int half, int in_quad) {
    return step * 16 + (kCodes ? in_quad * 4 + half * 2 : in_quad * 2 + half * 8);
  }
  // Dimension of output row `quad` or, for half 1, quad + 8. With codes the two of a pair are these.
  static __device__ int out_dim(int step, int half, int quad) {
    return step * 16 + (kCodes ? quad * 2 + half : quad + half * 8);
  }
};

}  // namespace attnsieve::sm80
