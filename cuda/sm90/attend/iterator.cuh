// BlockIterator of the producer warp: which keys fill tile t of a work item, in the visiting order
// of the semantics (the tile with the last visible key first, then the others ascending).
//   start()   number of tiles; all 32 lanes call it together
//   key()     first key at `offset` keys into tile `tile` < tiles, or kNoKey
#pragma once

#include "cuda/sm90/attend/config.h"

namespace attnsieve::sm90 {

// Every visible key; tile boundaries are multiples of kTileN in key position.
template <class Config>
class DenseTiles {
 public:
  __device__ int start(const AttendProblem&, const Work& work) {
    first_ = work.visible_begin / Config::kTileN;
    last_ = (work.visible_end - 1) / Config::kTileN;
    return work.visible_end > work.visible_begin ? last_ - first_ + 1 : 0;
  }

  __device__ int key(const AttendProblem&, const Work& work, int tile, int offset) const {
    const int key = (tile == 0 ? last_ : first_ + tile - 1) * Config::kTileN + offset;
    return key < work.visible_end ? key : Config::kNoKey;
  }

 private:
  int first_;
  int last_;
};

// The units of a BlockIndex row between its first and last visible entry, cut into visited tiles of
// max(skip_block, kTileN) keys in list order. The last, which takes the remainder, is visited first
// and padded at its front. An invalid entry leaves a gap.
template <class Config>
class ListTiles {
 public:
  __device__ int start(const AttendProblem& p, const Work& work) {
    const BlockIndexView& index = p.index;
    const int row = work.row / index.block_q;
    const int list = work.head / index.heads_per_list;
    int count = 0;
    if (row < index.num_rows) {
      count = index.counts[work.batch * index.counts_stride_batch +
                           list * index.counts_stride_head + row];
    }
    columns_ = index.columns + work.batch * index.columns_stride_batch +
               list * index.columns_stride_head + row * index.columns_stride_row;
    const int lane = threadIdx.x % kWarpThreads;
    end_ = max(0, min(count, index.capacity)) * units_per_block(p);
    while (end_ > 0) {
      const unsigned visible =
          __ballot_sync(0xffffffffu, unit_key(p, work, end_ - kWarpThreads + lane) != kNoKey);
      end_ = visible != 0 ? end_ - __clz(visible) : max(0, end_ - kWarpThreads);
      if (visible != 0) break;
    }
    begin_ = 0;
    while (work.visible_begin > 0 && begin_ < end_) {
      const unsigned visible = __ballot_sync(
          0xffffffffu, unit_key(p, work, begin_ + lane) != kNoKey);
      begin_ += visible != 0 ? __ffs(visible) - 1 : kWarpThreads;
      if (visible != 0) break;
    }
    const int units = max(0, end_ - begin_);
    const int per_tile = Config::kTileN / p.index.unit_keys();
    const int per_visit = max(p.threshold.skip_block, Config::kTileN) / p.index.unit_keys();
    first_units_ = units == 0 ? 0 : (units - 1) % per_visit + 1;
    first_tiles_ = (first_units_ + per_tile - 1) / per_tile;
    return first_tiles_ + (units - first_units_) / per_tile;
  }

  __device__ int key(const AttendProblem& p, const Work& work, int tile, int offset) const {
    const int unit_keys = p.index.unit_keys();
    const int per_tile = Config::kTileN / unit_keys;
    int slot = offset / unit_keys;
    if (tile < first_tiles_) {
      slot += end_ + (tile - first_tiles_) * per_tile;
      if (slot < end_ - first_units_) return kNoKey;
    } else {
      slot += begin_ + (tile - first_tiles_) * per_tile;
    }
    const int key = unit_key(p, work, slot);
    return key == kNoKey ? key : key + offset % unit_keys;
  }

 private:
  static constexpr int kNoKey = Config::kNoKey;

  static __device__ int units_per_block(const AttendProblem& p) {
    return p.index.block_k > kUnitKeys ? p.index.block_k / kUnitKeys : 1;
  }

  // First key of a unit of the list; kNoKey for an invalid id or a unit that no row sees.
  __device__ int unit_key(const AttendProblem& p, const Work& work, int slot) const {
    if (slot < 0 || slot >= end_) return kNoKey;
    const int per_block = units_per_block(p);
    const int64_t column = columns_[slot / per_block];
    const int64_t key = column * p.index.block_k + slot % per_block * kUnitKeys;
    const bool visible = column >= 0 && key < work.visible_end &&
                         key + p.index.unit_keys() > work.visible_begin;
    return visible ? static_cast<int>(key) : kNoKey;
  }

  const int32_t* columns_;
  int begin_;
  int end_;
  int first_units_;
  int first_tiles_;
};

}  // namespace attnsieve::sm90
