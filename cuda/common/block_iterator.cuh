// BlockIterator: which 64-key unit of K and V comes next. Both iterators walk one row group's units
// in the visiting order of the semantics: the tile that holds the last visible key first, then the
// other tiles ascending.
//   tile_units()  units of the tile about to be visited (0: finished)
//   next()        first key of the next unit of that tile
// Every thread of the CTA runs the same iterator in step; loads are uniform.
#pragma once

#include "cuda/common/work_tile.cuh"

namespace attnsieve {

// Every visible key. Tile boundaries are multiples of skip_block in key position.
class DenseIterator {
 public:
  __device__ DenseIterator(const AttendProblem& p, const WorkTile& tile, int* /*scratch*/)
      : problem_(p), tile_(tile) {
    if (tile.visible_begin >= tile.visible_end) return;
    unit_ = last_tile();
    end_ = end_unit();
  }

  __device__ int tile_units() const {
    const int boundary = (unit_ / units_per_tile() + 1) * units_per_tile();
    return min(boundary, end_) - unit_;
  }

  __device__ int next() {
    const int unit = unit_++;
    if (unit_ == end_unit()) {  // the first visited tile is done; the others end where it began
      unit_ = tile_.visible_begin / kUnitKeys;
      end_ = last_tile();
    }
    return unit * kUnitKeys;
  }

 private:
  __device__ int units_per_tile() const {
    return problem_.threshold.skip_block == kUnitKeys ? 1 : 2;
  }
  __device__ int end_unit() const { return (tile_.visible_end + kUnitKeys - 1) / kUnitKeys; }
  // First unit of the tile that holds the last visible key.
  __device__ int last_tile() const {
    return max(tile_.visible_begin / kUnitKeys, (end_unit() - 1) & ~(units_per_tile() - 1));
  }

  const AttendProblem& problem_;
  const WorkTile& tile_;
  int unit_ = 0;
  int end_ = 0;
};

// The units of a BlockIndex row that are valid and visible, cut into tiles in list order. What does
// not change during the walk is read again from the problem and the tile instead of living in
// registers.
class ListIterator {
 public:
  // Cost: one strided pass of the CTA over the row's list. `scratch` is one int of shared memory.
  __device__ ListIterator(const AttendProblem& p, const WorkTile& tile, int* scratch)
      : problem_(p), tile_(tile) {
    const BlockIndexView& index = p.index;
    const int row = tile.row_begin / index.block_q;
    const int list_head = tile.head / index.heads_per_list;
    int count = 0;
    if (row < index.num_rows) {
      count = index.counts[tile.batch * index.counts_stride_batch +
                           list_head * index.counts_stride_head + row];
      count = max(0, min(count, index.capacity));
    }
    columns_ = index.columns + tile.batch * index.columns_stride_batch +
               list_head * index.columns_stride_head +
               static_cast<int64_t>(row) * index.columns_stride_row;

    if (threadIdx.x == 0) *scratch = -1;
    __syncthreads();
    const int slots = count * units_per_block();
    int last_slot = -1;
    for (int base = 0; base < slots; base += static_cast<int>(blockDim.x)) {
      const int slot = base + static_cast<int>(threadIdx.x);
      const bool kept = slot < slots && key_of(slot) >= 0;
      if (kept) last_slot = slot;
      remaining_ += __syncthreads_count(kept);
    }
    if (last_slot >= 0) atomicMax(scratch, last_slot);
    __syncthreads();
    if (remaining_ == 0) return;

    first_tile_units_ = (remaining_ - 1) % units_per_tile() + 1;
    slot_ = *scratch;
    for (int found = 1; found < first_tile_units_; ++found) {
      do --slot_;
      while (key_of(slot_) < 0);
    }
  }

  __device__ int tile_units() const {
    if (first_tile_units_ > 0) return first_tile_units_;
    return min(units_per_tile(), remaining_);
  }

  __device__ int next() {
    int key = key_of(slot_++);
    while (key < 0) key = key_of(slot_++);
    --remaining_;
    if (first_tile_units_ > 0 && --first_tile_units_ == 0) slot_ = 0;
    return key;
  }

 private:
  __device__ int units_per_tile() const {
    return problem_.threshold.skip_block == kUnitKeys ? 1 : 2;
  }
  __device__ int units_per_block() const { return problem_.index.block_k == kUnitKeys ? 1 : 2; }

  // First key of list slot `slot`, or -1 for an invalid id or a unit that no row of the group sees.
  __device__ int key_of(int slot) const {
    const bool two_units = units_per_block() == 2;
    const int column = columns_[two_units ? slot / 2 : slot];
    const int64_t unit = two_units ? static_cast<int64_t>(column) * 2 + slot % 2 : column;
    const int64_t key = unit * kUnitKeys;
    return column >= 0 && key < tile_.visible_end && key + kUnitKeys > tile_.visible_begin
               ? static_cast<int>(key)
               : -1;
  }

  const AttendProblem& problem_;
  const WorkTile& tile_;
  const int32_t* columns_ = nullptr;
  int remaining_ = 0;
  int first_tile_units_ = 0;
  int slot_ = 0;
};

}  // namespace attnsieve
