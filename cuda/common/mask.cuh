// Causal, window and length masks as one interval of keys per query row.
#pragma once

#include "cuda/common/work_tile.cuh"

namespace attnsieve {

// Keys [begin, end) visible to one query row, relative to the first key of the unit at hand. Not
// clamped to the unit.
struct RowBounds {
  int begin;
  int end;

  __device__ bool contains(int key) const { return key >= begin && key < end; }
};

__device__ __forceinline__ RowBounds row_bounds(const WorkTile& tile, int row, int key0) {
  return {tile.first_key(row) - key0, tile.end_key(row) - key0};
}

// True if some row of the group does not see some key of the unit.
__device__ __forceinline__ bool needs_mask(const WorkTile& tile, int key0) {
  return key0 < tile.full_begin || key0 + kUnitKeys > tile.full_end;
}

}  // namespace attnsieve
