// Iterators over steps of 64 keys that are put together from pieces of 16 consecutive keys: units
// of 16 or 32 keys, and K and V in pages. They walk like the iterators of block_iterator.cuh, of
// which they are the slower, general form:
//   tile_units()  steps of the tile about to be visited (0: finished)
//   next()        called by whole warps; first key of the lane's piece in the next step (lane i has
//                 piece i % 4), or kNoPiece: zeros, and masked for every row
// Pieces that no row of the group sees are kNoPiece: neither they nor their pages are read.
#pragma once

#include "cuda/common/block_iterator.cuh"

namespace attnsieve {

inline constexpr int kPieceKeys = 16;
inline constexpr int kPieces = kUnitKeys / kPieceKeys;  // pieces of a step
inline constexpr int kNoPiece = kMaxTokens;  // behind every sequence

// Where a piece lies in K and V: row `row` of page `page` and the rows behind it. Page 0 of tensors
// without pages is the sequence.
struct PieceRows {
  int page;
  int row;
};

// Turns `key` into kNoPiece where the table names no page.
__device__ __forceinline__ PieceRows locate_piece(const PagedKv& paged, int batch, int* key) {
  if (*key == kNoPiece) return {0, 0};
  if (paged.block_table == nullptr) return {0, *key};
  const int entry = *key / paged.page_size;
  const int page = paged.block_table[batch * paged.table_stride_batch + entry];
  if (page < 0 || page >= paged.num_pages) {
    *key = kNoPiece;
    return {0, 0};
  }
  return {page, *key - entry * paged.page_size};
}

// `key`, or kNoPiece for a piece that no row of the group sees.
__device__ __forceinline__ int visible_piece(const WorkTile& tile, int key) {
  return key < tile.visible_end && key + kPieceKeys > tile.visible_begin ? key : kNoPiece;
}

// Every visible key of a paged sequence.
class DensePieceIterator {
 public:
  static constexpr bool kInPieces = true;

  __device__ DensePieceIterator(const AttendProblem& p, const WorkTile& tile,
                                IteratorScratch* scratch)
      : tile_(tile), units_(p, tile, scratch) {}

  __device__ int tile_units() const { return units_.tile_units(); }

  __device__ int next() {
    const int piece = static_cast<int>(threadIdx.x) % kPieces;
    return visible_piece(tile_, units_.next() + piece * kPieceKeys);
  }

 private:
  const WorkTile& tile_;
  DenseIterator units_;
};

// A BlockIndex row of any block_k. A warp looks at 32 list slots at a time and keeps what it found,
// one slot a lane, until the group's units among them are used up.
class ListPieceIterator : private ListWalk<true> {
 public:
  static constexpr bool kInPieces = true;

  __device__ ListPieceIterator(const AttendProblem& p, const WorkTile& tile,
                               IteratorScratch* scratch)
      : ListWalk(p, tile, scratch) {}

  __device__ int tile_units() const {
    const int steps_shift = kUnitShift - unit_shift();  // log2 of the units of a step
    return (units_left() + (1 << steps_shift) - 1) >> steps_shift;
  }

  __device__ int next() {
    const int wanted = min(units_left(), kUnitKeys >> unit_shift());
    const int piece_key = static_cast<int>(threadIdx.x) % kPieces * kPieceKeys;
    const int unit = piece_key >> unit_shift();  // of the step: this lane's piece lies in it
    int key = -1;
    int found = 0;
    // The bound on slots only matters where the list changes under the kernel.
    while (found < wanted && (window_units_ != 0 || slot_ < scratch_->slots)) {
      if (window_units_ == 0) look_at_slots();
      const int taken = min(wanted - found, __popc(window_units_));
      const int owner = __ffs(without_lowest(window_units_, unit - found)) - 1;
      const int candidate = __shfl_sync(0xffffffffu, window_key_, max(owner, 0));
      if (unit >= found && unit < found + taken) key = candidate;
      window_units_ = without_lowest(window_units_, taken);
      found += taken;
    }
    if (pass(wanted)) {
      slot_ = 0;
      window_units_ = 0;
    }
    if (key < 0) return kNoPiece;
    return visible_piece(tile_, key + (piece_key & ((1 << unit_shift()) - 1)));
  }

 private:
  __device__ void look_at_slots() {
    const int slot = slot_ + static_cast<int>(threadIdx.x) % kWarpThreads;
    window_key_ = slot < scratch_->slots ? key_of(slot) : -1;
    window_units_ = __ballot_sync(0xffffffffu, window_key_ >= 0);
    slot_ += kWarpThreads;
  }

  // `bits` without its `count` lowest set ones (at most as many as a step has units).
  static __device__ unsigned without_lowest(unsigned bits, int count) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (i < count) bits &= bits - 1;
    }
    return bits;
  }

  int window_key_ = -1;
  unsigned window_units_ = 0;  // lanes that hold a unit not used yet
};

}  // namespace attnsieve
