// Everything about the sm_80 attend kernel that is fixed at compile time: element, head_dim, tile,
// warps, layouts.
#pragma once

#include <cute/tensor.hpp>

#include "cuda/common/piece_iterator.cuh"

namespace attnsieve::sm80 {

template <class Element_, int kHeadDim_, int kTileN_, int kWarps_, int kStages_,
          bool kQueryInRegisters_, bool kInPieces_>
struct AttendConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileM = kGroupRows;  // query rows of a CTA
  static constexpr int kTileN = kTileN_;      // keys of one online-softmax step
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = kStages_;    // steps of K, and of V, held in shared memory
  static constexpr int kStepUnits = kTileN / kUnitKeys;
  static constexpr int kMinBlocks = 256 / kThreads;  // 8 warps an SM: 255 registers a thread
  // Otherwise Q fragments are read from shared memory again for every step.
  static constexpr bool kQueryInRegisters = kQueryInRegisters_;
  static constexpr bool kInPieces = kInPieces_;  // steps are put together from pieces
  static_assert(kTileM % (16 * kWarps) == 0, "a warp owns whole 16-row MMA tiles");
  static_assert(kTileN == kUnitKeys || kHeadDim == 64, "units of a step lie behind each other");
  static_assert(kHeadDim % 64 == 0, "shared-memory rows are made of 64-element swizzle atoms");

  using MmaAtom = std::conditional_t<std::is_same_v<Element, cute::bfloat16_t>,
                                     cute::MMA_Atom<cute::SM80_16x8x16_F32BF16BF16F32_TN>,
                                     cute::MMA_Atom<cute::SM80_16x8x16_F32F16F16F32_TN>>;
  using TiledMma =
      cute::TiledMMA<MmaAtom, cute::Layout<cute::Shape<cute::Int<kWarps>, cute::_1, cute::_1>>,
                     cute::Tile<cute::Int<16 * kWarps>, cute::_16, cute::_16>>;

  // 8 rows x 64 elements with a 16-byte XOR swizzle: conflict-free for cp.async, ldmatrix and
  // ldmatrix.trans.
  using SmemAtom = decltype(cute::composition(
      cute::Swizzle<3, 3, 3>{},
      cute::Layout<cute::Shape<cute::_8, cute::_64>, cute::Stride<cute::_64, cute::_1>>{}));
  // 64 rows: Q, the output, and one unit of K or V. A step of two units is two of these in a row.
  using SmemLayoutUnit = decltype(cute::tile_to_shape(
      SmemAtom{}, cute::Shape<cute::Int<kTileM>, cute::Int<kHeadDim>>{}));
  using SmemLayoutKV = decltype(cute::tile_to_shape(
      SmemAtom{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>>{}));
  using SmemLayoutVt = decltype(cute::composition(
      SmemLayoutKV{}, cute::make_layout(cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>>{},
                                        cute::GenRowMajor{})));

  // What a warp knows about the pieces of a tile.
  struct PieceTable {
    PieceRows rows[kStages][kPieces];
    int keys[2][kStages][kPieces];
  };
  struct NoTable {};

  struct SharedStorage {
    alignas(128) Element q[kTileM * kHeadDim];  // reused for the output tile
    alignas(128) Element k[kStages][kTileN * kHeadDim];
    alignas(128) Element v[kStages][kTileN * kHeadDim];
    const Element* k_base;  // of the sequence and KV head; paged: of the first page
    const Element* v_base;
    WorkTile tile;  // read where needed instead of living in registers through the loop
    IteratorScratch iterator_scratch;
    std::conditional_t<kInPieces, PieceTable[kWarps], NoTable> pieces;
  };
};

}  // namespace attnsieve::sm80
