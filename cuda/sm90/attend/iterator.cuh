// BlockIterator of the producer warps: which keys fill tile t of a work item, in the visiting order
// of the semantics (the tile with the last visible key first, then the others ascending).
//   start()   number of tiles; all 32 lanes call it together
//   slot()    what stands at `offset` keys into tile `tile` < tiles, or kNoKey
//   kFetches  whether fetch() loads anything: loops without are half as long, and fit the caches of
//             instructions beside the consumers' (up to 5 % of the cycles of voted tiles)
//   fetch()   starts the load that key() needs
//   key()     first key at the slot, or kNoKey; `fetched` is what fetch() returned, tiles earlier
#pragma once

#include "cuda/sm90/attend/config.h"

namespace attnsieve::sm90 {

// Every visible key; tile boundaries are multiples of kTileN in key position.
template <class Config>
class DenseTiles {
 public:
  static constexpr bool kFetches = false;

  __device__ int start(const AttendArguments&, const Work& work) {
    first_ = work.visible_begin / Config::kTileN;
    last_ = (work.visible_end - 1) / Config::kTileN;
    return work.visible_end > work.visible_begin ? last_ - first_ + 1 : 0;
  }

  __device__ int slot(int tile, int offset) const {
    return (tile == 0 ? last_ : first_ + tile - 1) * Config::kTileN + offset;
  }

  __device__ int fetch(int /*slot*/) const { return 0; }

  __device__ int key(const AttendArguments&, const Work& work, int slot, int /*fetched*/) const {
    return slot < work.visible_end ? slot : Config::kNoKey;
  }

 private:
  int first_;
  int last_;
};

// The units of a BlockIndex row between its first and last visible entry, cut into visited tiles of
// max(skip_block, kTileN) keys in list order. The last, which takes the remainder, is visited first
// and padded at its front. An invalid entry leaves a gap. Slots count keys of the list, so that
// pieces smaller than a unit have slots of their own.
template <class Config>
class ListTiles {
 public:
  static constexpr bool kFetches = true;

  __device__ int start(const AttendArguments& a, const Work& work) {
    const BlockIndexView& index = a.problem.index;
    const int row = work.row >> (__ffs(index.block_q) - 1);
    const int list = a.heads_per_list.div(work.head);
    int count = 0;
    if (row < index.num_rows) {
      count = index.counts[work.batch * index.counts_stride_batch +
                           list * index.counts_stride_head + row];
    }
    columns_ = index.columns + work.batch * index.columns_stride_batch +
               list * index.columns_stride_head + row * index.columns_stride_row;
    log2_block_ = __ffs(index.block_k) - 1;

    const int unit = index.unit_keys();
    int end = max(0, min(count, index.capacity)) << log2_block_;
    const int lane_key = static_cast<int>(threadIdx.x) % kWarpThreads * unit;
    const int warp_keys = kWarpThreads * unit;
    const auto visible = [&](int slot) {
      return slot >= 0 && slot < end && key(a, work, slot, fetch(slot)) != Config::kNoKey;
    };
    while (end > 0) {
      const unsigned found = __ballot_sync(0xffffffffu, visible(end - warp_keys + lane_key));
      end = found != 0 ? end - __clz(found) * unit : max(0, end - warp_keys);
      if (found != 0) break;
    }
    int begin = 0;
    while (work.visible_begin > 0 && begin < end) {
      const unsigned found = __ballot_sync(0xffffffffu, visible(begin + lane_key));
      begin += found != 0 ? (__ffs(found) - 1) * unit : warp_keys;
      if (found != 0) break;
    }
    const int keys = max(0, end - begin);
    const int visit_keys = max(a.problem.threshold.skip_block, Config::kTileN);
    const int first_keys = keys == 0 ? 0 : ((keys - 1) & (visit_keys - 1)) + 1;
    first_tiles_ = (first_keys + Config::kTileN - 1) / Config::kTileN;
    first_begin_ = end - first_keys;
    first_slot_ = end - first_tiles_ * Config::kTileN;
    next_slot_ = begin - first_tiles_ * Config::kTileN;
    return first_tiles_ + (keys - first_keys) / Config::kTileN;
  }

  __device__ int slot(int tile, int offset) const {
    const bool first = tile < first_tiles_;
    const int slot = (first ? first_slot_ : next_slot_) + tile * Config::kTileN + offset;
    return first && slot < first_begin_ ? Config::kNoKey : slot;
  }

  __device__ int fetch(int slot) const {
    return slot == Config::kNoKey ? -1 : __ldg(columns_ + (slot >> log2_block_));
  }

  // kNoKey also for an invalid id or a unit that no row sees.
  __device__ int key(const AttendArguments& a, const Work& work, int slot, int column) const {
    // Past this no id is valid, and the product below fits 32 bits.
    if (static_cast<unsigned>(column) >= static_cast<unsigned>(kMaxTokens) >> log2_block_) {
      return Config::kNoKey;
    }
    const int key = (column << log2_block_) + (slot & ((1 << log2_block_) - 1));
    const bool visible =
        key < work.visible_end && key + a.problem.index.unit_keys() > work.visible_begin;
    return visible ? key : Config::kNoKey;
  }

 private:
  const int32_t* columns_;
  int log2_block_;
  int first_tiles_;
  int first_begin_;  // slots before it, in the first tiles, are padding
  int first_slot_;
  int next_slot_;
};

}  // namespace attnsieve::sm90
