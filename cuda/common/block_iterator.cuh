// BlockIterator: which 64-key unit of K and V comes next. Both iterators walk one row group's units
// in the visiting order of the semantics: the tile that holds the last visible key first, then the
// other tiles ascending.
//   tile_units()  units of the tile about to be visited (0: finished)
//   next()        first key of the next unit of that tile
//   kInPieces     false: the keys of a unit lie behind each other in K and V (otherwise see
//                 piece_iterator.cuh)
// Every thread of the CTA runs the same iterator in step; loads are uniform.
#pragma once

#include "cuda/common/work_tile.cuh"

namespace attnsieve {

// What an iterator keeps in shared memory.
struct IteratorScratch {
  int last_slot;
  int slots;
  const int32_t* columns;
};

// Every visible key. Tile boundaries are multiples of skip_block in key position.
class DenseIterator {
 public:
  static constexpr bool kInPieces = false;

  __device__ DenseIterator(const AttendProblem& p, const WorkTile& tile,
                           IteratorScratch* /*scratch*/)
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

// Where a row group stands in its BlockIndex row. The row's kept units (valid, and visible to some
// row of the q-block) are numbered in list order and cut into tiles from the start, so that all
// groups of a q-block share the cut; the group passes over the units that it does not see itself.
// What does not change during the walk is read again from the problem and the tile instead of
// living in registers. kSmallUnits: block_k below 64 may occur, and the list is looked at so rarely
// that where it lies stays in shared memory.
template <bool kSmallUnits>
class ListWalk {
 protected:
  // Cost: one strided pass of the CTA over the row's list.
  __device__ ListWalk(const AttendProblem& p, const WorkTile& tile, IteratorScratch* scratch)
      : problem_(p), tile_(tile), scratch_(scratch) {
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
    const int slots = count * units_per_block();
    if (threadIdx.x == 0) *scratch = {-1, slots, columns_};
    __syncthreads();

    // The q-block's first row bounds what it sees on the left, its last row on the right. A group
    // at its start shares the first row, a group at its end the last one: what the group does not
    // see lies behind what it sees, or before it.
    const int block_begin = row * index.block_q;
    const int block_end = min(block_begin + index.block_q, tile.seqlen_q);
    const bool shared = block_end - block_begin > kGroupRows;
    const int begin = tile.first_key(block_begin);
    const int end = tile.end_key(block_end - 1);

    int visible = 0;
    int hidden = 0;
    int last_slot = -1;
    for (int base = 0; base < slots; base += static_cast<int>(blockDim.x)) {
      const int slot = base + static_cast<int>(threadIdx.x);
      const bool seen = slot < slots && key_of(slot) >= 0;
      if (seen) last_slot = slot;
      visible += __syncthreads_count(seen);
      if (shared) {
        const bool kept = slot < slots && key_between(slot, begin, end) >= 0;
        hidden += __syncthreads_count(kept && !seen);
      }
    }
    if (last_slot >= 0) atomicMax(&scratch->last_slot, last_slot);
    __syncthreads();
    if (visible == 0) return;

    rank_ = tile.row_begin == block_begin ? 0 : hidden;
    rank_end_ = rank_ + visible;
    const int last_tile = (visible + hidden - 1) & ~(units_per_tile() - 1);
    if (rank_end_ <= last_tile) return;  // the group sees nothing of the row's last tile
    const int first_visited = max(rank_, last_tile);
    first_tile_units_ = rank_end_ - first_visited;
    rank_end_ = first_visited;
    slot_ = scratch->last_slot;
    for (int found = 1; found < first_tile_units_; ++found) {
      do --slot_;
      while (key_of(slot_) < 0);
    }
  }

  // Units that the tile at hand still holds.
  __device__ int units_left() const {
    if (first_tile_units_ > 0) return first_tile_units_;
    return min(units_per_tile() - (rank_ & (units_per_tile() - 1)), rank_end_ - rank_);
  }

  // Steps over `units` units of the tile at hand. True where the walk goes on at the list's start.
  __device__ bool pass(int units) {
    if (first_tile_units_ == 0) {
      rank_ += units;
      return false;
    }
    first_tile_units_ -= units;
    return first_tile_units_ == 0;
  }

  // log2 of the keys of a unit.
  __device__ int unit_shift() const {
    return kSmallUnits ? __ffs(problem_.index.unit_keys()) - 1 : kUnitShift;
  }
  __device__ int units_per_tile() const {
    if (kSmallUnits) return problem_.threshold.skip_block >> unit_shift();
    return problem_.threshold.skip_block == kUnitKeys ? 1 : 2;
  }
  __device__ int units_per_block() const { return problem_.index.block_k > kUnitKeys ? 2 : 1; }

  // First key of list slot `slot`, or -1 for an invalid id or a unit without a key in [begin, end).
  __device__ int key_between(int slot, int begin, int end) const {
    const bool two_units = units_per_block() == 2;
    const int32_t* const columns = kSmallUnits ? scratch_->columns : columns_;
    const int column = columns[two_units ? slot / 2 : slot];
    const int64_t unit = two_units ? static_cast<int64_t>(column) * 2 + slot % 2 : column;
    const int64_t key = unit * (int64_t{1} << unit_shift());
    const bool kept = column >= 0 && key < end && key + (1 << unit_shift()) > begin;
    return kept ? static_cast<int>(key) : -1;
  }

  // The same, -1 for a unit that no row of the group sees.
  __device__ int key_of(int slot) const {
    return key_between(slot, tile_.visible_begin, tile_.visible_end);
  }

  static constexpr int kUnitShift = 6;
  static_assert(1 << kUnitShift == kUnitKeys);

  const AttendProblem& problem_;
  const WorkTile& tile_;
  const IteratorScratch* scratch_;
  const int32_t* columns_ = nullptr;
  int slot_ = 0;  // where to look for the next unit
  int first_tile_units_ = 0;  // units left of the row's last tile, which is visited first
  int rank_ = 0;  // number of the next unit of the other tiles, and their end
  int rank_end_ = 0;
};

// The units of 64 keys of a BlockIndex row.
class ListIterator : private ListWalk<false> {
 public:
  static constexpr bool kInPieces = false;

  __device__ ListIterator(const AttendProblem& p, const WorkTile& tile, IteratorScratch* scratch)
      : ListWalk(p, tile, scratch) {}

  __device__ int tile_units() const { return units_left(); }

  __device__ int next() {
    int key = key_of(slot_++);
    while (key < 0) key = key_of(slot_++);
    if (pass(1)) slot_ = 0;
    return key;
  }
};

}  // namespace attnsieve
