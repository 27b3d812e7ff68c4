// The warps that keep the rings full: one locates work items, one copies Q and the tiles of K, one
// the tiles of V. A single warp for K and V is too slow: it spends 85 % of a tile's time on issuing
// (H200, 2026-11-22, lists of 64-key boxes).
#pragma once

#include "cuda/sm90/attend/schedule.cuh"

namespace attnsieve::sm90 {

// The item that this CTA takes after `item`. Counting starts behind the first of every CTA.
__device__ __forceinline__ int item_after(const AttendArguments& a, int item) {
  const int ctas = static_cast<int>(gridDim.x);
  if (a.next_item == nullptr) return item + ctas;
  int taken = 0;
  if (threadIdx.x % kWarpThreads == 0) taken = static_cast<int>(atomicAdd(a.next_item, 1u));
  return ctas + __shfl_sync(0xffffffffu, taken, 0);
}

// Locates the items of this CTA ahead of time and publishes them, with their iterators. Fixed
// shares as early as the ring allows; from the counter when the copies of K near the item's end, so
// that no CTA holds back work that another is free for.
template <class Config, class BlockIterator>
__device__ void schedule_work(const AttendArguments& a, typename Config::SharedStorage& smem) {
  RingPosition<Config::kWorkSlots> position(1);
  RingPosition<1> ending(0);
  int item = blockIdx.x;
  while (true) {
    Work work;
    bool found = false;
    while (item < a.num_items) {
      found = locate<Config>(a, item, &work);
      if (found) break;
      item = item_after(a, item);
    }
    BlockIterator iterator;
    work.tiles = found ? iterator.start(a, work) : -1;
    smem.work_empty[position.slot].wait_idle(position.phase);
    if (threadIdx.x % kWarpThreads == 0) {
      smem.work[position.slot] = work;
      smem.template iterator<BlockIterator>(position.slot) = iterator;
      smem.work_full[position.slot].arrive();
    }
    if (!found) return;
    position.advance();
    if (a.next_item != nullptr) {
      smem.item_ending.wait_idle(ending.phase);
      ending.advance();
    }
    item = item_after(a, item);
  }
}

enum class Operand { kKeys, kValues };

// Copies the tiles of K (and Q) or of V. List entries are read two tiles ahead and page numbers one,
// so that no load is waited for where it starts.
template <class Config, class BlockIterator, Operand kOperand>
class TileProducer {
  using Element = typename Config::Element;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr bool kKeys = kOperand == Operand::kKeys;
  static constexpr int kStages = kKeys ? Config::kStagesK : Config::kStagesV;
  static constexpr int kNoKey = Config::kNoKey;
  // Tiles left when the next item is asked for: their time covers a counter, a list and a barrier.
  static constexpr int kTilesAhead = 4;

 public:
  __device__ TileProducer(const AttendArguments& arguments, SharedStorage& smem)
      : a_(arguments), smem_(smem) {
    offset_ = static_cast<int>(threadIdx.x) % kWarpThreads / kLanesPerPiece * a_.piece_keys;
  }

  __device__ void run() {
    while (true) {
      smem_.work_full[work_.slot].wait(work_.phase);
      // Copies: registers are cheaper than reading shared memory again for every tile.
      const Work work = smem_.work[work_.slot];
      const BlockIterator iterator = smem_.template iterator<BlockIterator>(work_.slot);
      if (work.tiles < 0) break;
      __syncwarp();
      if (is_leader()) smem_.work_empty[work_.slot].arrive();
      work_.advance();

      // Of the next even and the next odd tile. Moving a load's result from one register to another
      // would wait for it.
      int fetched[2] = {fetch(work, iterator, 0), fetch(work, iterator, 1)};
      const int near_end = max(0, work.tiles - kTilesAhead);
      if constexpr (kKeys) {
        load_queries(work);
        if (work.tiles == 0) announce_end();
      }
      Piece piece = resolve(work, iterator, 0, fetched[0]);
      const auto load = [&](int tile, auto parity) {
        constexpr int kParity = decltype(parity)::value;
        fetched[kParity] = fetch(work, iterator, tile + 2);
        if (kKeys && tile == near_end) announce_end();
        load_tile(work, piece);
        piece = resolve(work, iterator, tile + 1, fetched[1 - kParity]);
      };
#pragma unroll 1
      for (int tile = 0; tile < work.tiles; tile += 2) {
        load(tile, cute::Int<0>{});
        if (tile + 1 < work.tiles) load(tile + 1, cute::Int<1>{});
      }
    }
    if constexpr (!kKeys) request_check(Config::kStagesV, 0);
  }

 private:
  // What this lane copies of a tile.
  struct Piece {
    int key;  // first key, kNoKey for none, ~key where its page is missing
    int page;
  };

  static constexpr int kLanesPerPiece = Config::kInterleaved ? 1 : Config::kSlices;
  static __device__ int slice() { return threadIdx.x % kWarpThreads % kLanesPerPiece; }
  static __device__ bool is_real(int key) { return key >= 0 && key != kNoKey; }
  static __device__ bool is_leader() { return threadIdx.x % kWarpThreads == 0; }

  __device__ void announce_end() const {
    if (is_leader()) smem_.item_ending.arrive();
  }

  // Starts the load that resolves this lane's part of a tile.
  __device__ int fetch(const Work& work, const BlockIterator& iterator, int tile) const {
    if (offset_ >= Config::kTileN || tile >= work.tiles) return -1;
    return iterator.fetch(iterator.slot(tile, offset_));
  }

  // Starts the load of the page number where K and V are paged.
  __device__ Piece resolve(const Work& work, const BlockIterator& iterator, int tile,
                           int fetched) const {
    if (offset_ >= Config::kTileN || tile >= work.tiles) return {kNoKey, 0};
    const int key = iterator.key(a_, work, iterator.slot(tile, offset_), fetched);
    const PagedKv& paged = a_.problem.paged;
    if (paged.block_table == nullptr || key == kNoKey) return {key, 0};
    return {key, paged.block_table[work.batch * paged.table_stride_batch + key / paged.page_size]};
  }

  __device__ void load_queries(const Work& work) {
    const int lane = threadIdx.x % kWarpThreads;
    if (lane < Config::kWarpgroups) {
      const int tile = q_.slot * Config::kWarpgroups + lane;
      const int head = work.head + (a_.pack_heads ? lane : 0);
      const int row = work.token_q + work.row + (a_.pack_heads ? 0 : lane * kWarpgroupRows);
      const int batch = a_.problem.varlen.cu_seqlens_q != nullptr ? 0 : work.batch;
      TransactionBarrier& full = smem_.q_full[tile];
      smem_.q_empty[tile].wait(q_.phase);
      full.arrive_expect(Config::kQueryBytes);
      Element* const target = smem_.q + tile * Config::kQueryElements;
#pragma unroll
      for (int slice = 0; slice < Config::kSlices; ++slice) {
        copy_box_4d(target + slice * kWarpgroupRows * Config::kSliceColumns, &a_.q, full,
                    slice * Config::kSliceColumns, row, head, batch);
      }
    }
    q_.advance();
  }

  // Fills the next stage, this lane's piece among the others.
  __device__ void load_tile(const Work& work, Piece piece) {
    const PagedKv& paged = a_.problem.paged;
    const bool active = offset_ < Config::kTileN;
    if (paged.block_table != nullptr && piece.key != kNoKey &&
        (piece.page < 0 || piece.page >= paged.num_pages)) {
      piece.key = ~piece.key;  // counts as part of the tile, but there is nothing to read
    }
    const int key = piece.key;
    const bool partial = active && (key < work.full_begin || key + a_.piece_keys > work.full_end);
    int flags = 0;
    if (__any_sync(0xffffffffu, partial)) {
      flags = Config::kMaskedTile;
      if (__any_sync(0xffffffffu, partial && is_real(key))) flags |= Config::kCheckedTile;
      if (!__any_sync(0xffffffffu, offset_ < Config::kStepKeys && key != kNoKey)) {
        flags |= Config::kPaddedStep;
      }
    }
    const int stage = position_.slot;
    TransactionBarrier& full = kKeys ? smem_.k_full[stage] : smem_.v_full[stage];
    Element* const tile = (kKeys ? smem_.k : smem_.v) + stage * Config::kTileElements;
    (kKeys ? smem_.k_empty[stage] : smem_.v_empty[stage]).wait_idle(position_.phase);
    record(kKeys ? smem_.k_record[stage] : smem_.v_record[stage], piece, flags);
    if (is_leader()) full.arrive_expect(Config::kTileBytes);
    __syncwarp();
    if (active) copy_piece(tile, full, work, piece);
    if (!kKeys && (flags & Config::kCheckedTile) != 0) {
      request_check(stage, position_.phase ^ 1);  // the parity of this fill
    }
    position_.advance();
  }

  // Asks the checking warp to look for NaN and Inf in a V stage; a stage past the last ends them.
  __device__ void request_check(int stage, uint32_t parity) {
    if (is_leader()) {
      smem_.check[check_.slot] = {stage, parity, 0};
      smem_.check_full[check_.slot].arrive();
    }
    check_.advance();
  }

  // What the consumers will want to know of a tile: written before its barrier is armed.
  __device__ void record(typename Config::TileRecord& record, const Piece& piece, int flags) const {
    if (flags != 0 && offset_ < Config::kTileN && slice() == 0) {
      for (int granule = 0; granule < a_.piece_keys; granule += Config::kGranuleKeys) {
        int key = piece.key;
        if (key < 0)
          key -= granule;  // ~(k + granule) = ~k - granule
        else if (key != kNoKey)
          key += granule;
        record.key[(offset_ + granule) / Config::kGranuleKeys] = key;
      }
    }
    if (is_leader()) record.flags = flags;
    __syncwarp();
  }

  // A piece without keys is copied from behind the tensor: zeros, no traffic, the same bytes.
  __device__ void copy_piece(Element* tile, TransactionBarrier& full, const Work& work,
                             const Piece& piece) const {
    const CUtensorMap& map = kKeys ? a_.k : a_.v;
    const CUtensorMap& group_map = kKeys ? a_.k_groups : a_.v_groups;
    const PagedKv& paged = a_.problem.paged;
    int row = kNoKey;
    int outer = 0;  // batch or page
    if (is_real(piece.key)) {
      const bool is_paged = paged.block_table != nullptr;
      row = is_paged ? piece.key % paged.page_size : work.token_k + piece.key;
      outer = is_paged ? piece.page : (a_.problem.varlen.cu_seqlens_k != nullptr ? 0 : work.batch);
    }
    if constexpr (!Config::kInterleaved) {
      copy_box_4d(tile + (slice() * Config::kTileN + offset_) * Config::kSliceColumns, &map, full,
                  slice() * Config::kSliceColumns, row, work.kv_head, outer);
    } else {
      Element* target = tile + offset_ * Config::kHeadDim;
      const int64_t group_row = static_cast<int64_t>(outer) * a_.rows_per_batch + row;
      if (group_row % 8 == 0 && group_row + a_.piece_keys <= a_.group_rows) {
        copy_box_5d(target, &group_map, full, 0, 0, 0, static_cast<int>(group_row / 8),
                    outer * a_.heads_per_batch + work.kv_head);
        return;
      }
#pragma unroll 1
      for (int rows = 0; rows < a_.piece_keys; rows += 8) {
        copy_box_5d(target, &map, full, 0, row + rows, 0, work.kv_head, outer);
        target += 8 * Config::kHeadDim;
      }
    }
  }

  const AttendArguments& a_;
  SharedStorage& smem_;
  int offset_;  // keys of this lane's piece into the tile
  RingPosition<kStages> position_{1};
  RingPosition<Config::kStagesQ> q_{1};
  RingPosition<Config::kWorkSlots> work_{0};
  RingPosition<Config::kCheckSlots> check_{1};
};

}  // namespace attnsieve::sm90
