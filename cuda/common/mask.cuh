// Causal, window and length masks as one interval of keys per query row.
#pragma once

#include "cuda/common/work_tile.cuh"

namespace attnsieve {

// Keys [begin, end) visible to one query row, relative to the first key of the unit at hand.
struct RowBounds {
  int begin;
  int end;
};

__device__ __forceinline__ int clamp_to_unit(int64_t x) {
  return static_cast<int>(max64(0, min64(x, kUnitKeys)));
}

__device__ __forceinline__ RowBounds row_bounds(const Mask& mask, const WorkTile& tile, int row,
                                                int key0) {
  const KeyRange keys = visible_keys(mask, row, row + 1, tile.seqlen_q, tile.seqlen_k);
  return {clamp_to_unit(keys.begin - key0), clamp_to_unit(keys.end - key0)};
}

// True if some row of the group does not see some key of the unit.
__device__ __forceinline__ bool needs_mask(const WorkTile& tile, int key0) {
  return key0 < tile.full_begin || key0 + kUnitKeys > tile.full_end;
}

}  // namespace attnsieve
