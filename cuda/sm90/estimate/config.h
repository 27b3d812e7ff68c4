// Tiles, MMA and shared memory of the sm_90 estimator.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "attnsieve/estimate.h"
#include "cuda/common/ptx_sm90.cuh"

namespace attnsieve::sm90 {

// What a CTA or a warpgroup walks over: stages of keys, the keys in them that some of its rows see,
// and those that all see.
struct EstimateWalk {
  int begin;
  int end;
  int begin_key;
  int end_key;
  int all_begin;
  int all_end;
};

// Where a warp's q-blocks are, and the results of the first. In shared memory: registers are short.
struct EstimatePlace {
  float* scores;
  uint32_t* bits;
  int first_block;
  int num_blocks;
  int columns;      // KV blocks of a line
  int stage_shift;  // a stage has 1 << stage_shift of them,
  int block_units;  // each of so many units
};

template <int kHeadDim_, int kUnitKeys_, int kBlockRows_>
struct EstimateConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kUnitKeys = kUnitKeys_;  // 16 or 32, of which a lane's share a scale
  static constexpr int kBlockRows = kBlockRows_;  // sampled rows of a q-block: 8, 16, 32 or 64
  static constexpr int kWarpgroups = 3;
  static constexpr int kWarps = kWarpgroups * 4;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kScoreRegisters = 152;
  static constexpr int kCopyRegisters = 56;
  // What is freed has to suffice: registers are those of the launch, in eights a thread.
  static_assert(kScoreRegisters * kWarpgroups * 128 + kCopyRegisters * 128 <=
                65536 / kThreads / 8 * 8 * kThreads);
  static constexpr int kFragments = 4;  // of 16 rows, of a warp
  static constexpr int kWarpRows = kFragments * 16;
  static constexpr int kTileKeys = 64;  // of an MMA
  static constexpr int kStageTiles = 8;
  static constexpr int kStageKeys = kTileKeys * kStageTiles;
  static constexpr int kStages = kHeadDim > 128 ? 1 : kHeadDim > 64 ? 3 : 6;
  static constexpr int kSteps = kHeadDim / 32;
  static constexpr int kTileUnits = kTileKeys / kUnitKeys;
  static constexpr int kStageUnits = kStageKeys / kUnitKeys;
  static constexpr int kBlocks = kWarpRows / kBlockRows;  // q-blocks of a warp
  static constexpr int kStoreStages = kBlocks == 8 ? 2 : 4;  // whose results are stored together
  static constexpr int kStageBytes = kStageKeys * kHeadDim;
  static constexpr int kSliceBytes = kHeadDim % 128 == 0 ? 128 : kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kSlices = kHeadDim / kSliceBytes;

  using Atom = std::conditional_t<
      kSliceBytes == 128, cute::GMMA::Layout_K_SW128_Atom<int8_t>,
      std::conditional_t<kSliceBytes == 64, cute::GMMA::Layout_K_SW64_Atom<int8_t>,
                         cute::GMMA::Layout_K_SW32_Atom<int8_t>>>;
  using LayoutKeys = decltype(cute::tile_to_shape(
      Atom{},
      cute::Shape<cute::Int<kTileKeys>, cute::Int<kHeadDim>, cute::Int<kStages * kStageTiles>>{}));
  using Mma = decltype(cute::make_tiled_mma(cute::SM90_64x64x32_S32S8S8_RS_TN{}));

  struct SharedStorage {
    alignas(1024) int8_t keys[kStages * kStageBytes];
    // Of a quad's lanes: their keys of each unit.
    alignas(16) float scales[kStages][kStageTiles][4][kTileUnits];
    EstimatePlace places[kWarps];
    EstimateSequence sequence;
    EstimateWalk walk;
    EstimateWalk own[kWarpgroups];
    float4 rows[kWarps][kFragments][8];  // factor and threshold of a row and of that eight behind
    union {  // of the stages stored together: maxima of units, or marks of a tile's units
      alignas(16) int32_t best[kWarps][kBlocks][kStoreStages * kStageUnits];
      uint32_t marks[kWarps][kBlocks][kStoreStages * kStageTiles];
    };
    uint32_t words[kWarps][kBlocks];  // bits of each q-block, under way
    TransactionBarrier full[kStages];
    TransactionBarrier empty[kStages];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace attnsieve::sm90
