// The two warps that keep the rings full: one locates work items, the other copies their tiles.
#pragma once

#include "cuda/sm90/attend/schedule.cuh"

namespace attnsieve::sm90 {

// Locates the items of this CTA ahead of time and publishes them, with their iterators.
template <class Config, class BlockIterator>
__device__ void schedule_work(const AttendArguments& a, typename Config::SharedStorage& smem,
                              BlockIterator* iterators) {
  const bool leader = threadIdx.x % kWarpThreads == 0;
  RingPosition<Config::kWorkSlots> position(1);
  int item = blockIdx.x;
  while (true) {
    Work work;
    bool found = false;
    while (!found && item < a.num_items) {
      found = locate<Config>(a, item, &work);
      item += static_cast<int>(gridDim.x);
    }
    work.tiles = -1;
    BlockIterator iterator;
    if (found) work.tiles = iterator.start(a.problem, work);
    smem.work_empty[position.slot].wait(position.phase);
    if (leader) {
      smem.work[position.slot] = work;
      iterators[position.slot] = iterator;
      smem.work_full[position.slot].arrive();
    }
    if (!found) return;
    position.advance();
  }
}

// Copies tile after tile. Keys are read two tiles ahead and page numbers one, so that no load is
// waited for where it starts.
template <class Config, class BlockIterator>
class TileProducer {
  using Element = typename Config::Element;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kNoKey = Config::kNoKey;
  static constexpr int kNoPage = -1;

 public:
  __device__ TileProducer(const AttendArguments& arguments, SharedStorage& smem,
                          const BlockIterator* iterators)
      : a_(arguments), smem_(smem), iterators_(iterators) {
    const int lane = threadIdx.x % kWarpThreads;
    const int lanes_per_piece = Config::kInterleaved ? 1 : Config::kSlices;
    slice_ = lane % lanes_per_piece;
    offset_ = lane / lanes_per_piece * a_.piece_keys;
  }

  __device__ void run() {
    const Work* work = next_work();
    int key = key_of(0);
    int key_ahead = key_of(1);
    while (work->tiles >= 0) {
      int page = page_of(*work, key);
      load_queries(*work);
      Piece previous{kNoKey, 0, 0};
      const int tiles = work->tiles;
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        const int key_later = key_of(tile + 2);
        const Piece piece = locate_piece(*work, key, page);
        load_tile(a_.k, a_.k_groups, smem_.k, smem_.k_full, smem_.k_empty, smem_.k_record, k_,
                  *work, piece);
        page = page_of(*work, key_ahead);
        if (tile > 0) load_values(*work, previous);
        previous = piece;
        key = key_ahead;
        key_ahead = key_later;
      }
      const int slot = work_.slot;
      work_.advance();
      const Work* const next = next_work();
      key = key_of(0);
      key_ahead = key_of(1);
      if (tiles > 0) load_values(*work, previous);
      __syncwarp();
      if (is_leader()) smem_.work_empty[slot].arrive();
      work = next;
    }
    request_check(Config::kStagesV, 0);
  }

 private:
  // What this lane copies of a tile.
  struct Piece {
    int key;  // first key, kNoKey for none
    int page;
    int flags;  // of the whole tile
  };

  static __device__ bool is_leader() { return threadIdx.x % kWarpThreads == 0; }

  __device__ const Work* next_work() {
    smem_.work_full[work_.slot].wait(work_.phase);
    return &smem_.work[work_.slot];
  }

  // First key of this lane's piece of a tile of the current item.
  __device__ int key_of(int tile) const {
    const Work& work = smem_.work[work_.slot];
    if (offset_ >= Config::kTileN || tile >= work.tiles) return kNoKey;
    return iterators_[work_.slot].key(a_.problem, work, tile, offset_);
  }

  __device__ int page_of(const Work& work, int key) const {
    const PagedKv& paged = a_.problem.paged;
    if (paged.block_table == nullptr || key == kNoKey) return kNoPage;
    return paged.block_table[work.batch * paged.table_stride_batch + key / paged.page_size];
  }

  __device__ Piece locate_piece(const Work& work, int key, int page) const {
    const bool active = offset_ < Config::kTileN;
    const PagedKv& paged = a_.problem.paged;
    if (paged.block_table != nullptr && (page < 0 || page >= paged.num_pages)) key = kNoKey;
    const bool partial =
        active && (key < work.full_begin || key + a_.piece_keys > work.full_end);
    int flags = 0;
    if (__any_sync(0xffffffffu, partial)) {
      flags = Config::kMaskedTile;
      if (__any_sync(0xffffffffu, partial && key != kNoKey)) flags |= Config::kCheckedTile;
      if (!__any_sync(0xffffffffu, offset_ < Config::kStepKeys && key != kNoKey)) {
        flags |= Config::kPaddedStep;
      }
    }
    return {key, page, flags};
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

  __device__ void load_values(const Work& work, const Piece& piece) {
    const int stage = v_.slot;
    const uint32_t parity = v_.phase ^ 1;  // of the fill about to start
    load_tile(a_.v, a_.v_groups, smem_.v, smem_.v_full, smem_.v_empty, smem_.v_record, v_, work,
              piece);
    if ((piece.flags & Config::kCheckedTile) != 0) request_check(stage, parity);
  }

  // Asks the checking warps to look for NaN and Inf in a V stage; a stage past the last ends them.
  __device__ void request_check(int stage, uint32_t parity) {
    if (is_leader()) {
      smem_.check[check_.slot] = {stage, parity, 0};
      smem_.check_full[check_.slot].arrive();
    }
    check_.advance();
  }

  // Fills one stage of K or V, this lane's piece among the others.
  template <int kStages>
  __device__ void load_tile(const CUtensorMap& map, const CUtensorMap& group_map, Element* tiles,
                            TransactionBarrier (&full)[kStages],
                            TransactionBarrier (&empty)[kStages],
                            typename Config::TileRecord (&records)[kStages],
                            RingPosition<kStages>& position, const Work& work,
                            const Piece& piece) {
    const int stage = position.slot;
    const bool active = offset_ < Config::kTileN;
    empty[stage].wait(position.phase);
    auto& record = records[stage];
    if (piece.flags != 0 && active && slice_ == 0) {
      for (int granule = 0; granule < a_.piece_keys; granule += Config::kGranuleKeys) {
        record.key[(offset_ + granule) / Config::kGranuleKeys] =
            piece.key == kNoKey ? kNoKey : piece.key + granule;
      }
    }
    __syncwarp();
    if (is_leader()) {
      record.flags = piece.flags;
      full[stage].arrive_expect(Config::kTileBytes);
    }
    __syncwarp();
    if (active) {
      copy_piece(map, group_map, tiles + stage * Config::kTileElements, full[stage], work, piece);
    }
    position.advance();
  }

  // A piece without keys is copied from behind the tensor: zeros, no traffic, the same bytes.
  __device__ void copy_piece(const CUtensorMap& map, const CUtensorMap& group_map, Element* tile,
                             TransactionBarrier& full, const Work& work,
                             const Piece& piece) const {
    const PagedKv& paged = a_.problem.paged;
    int row = kNoKey;
    int outer = 0;  // batch or page
    if (piece.key != kNoKey) {
      const bool is_paged = paged.block_table != nullptr;
      row = is_paged ? piece.key % paged.page_size : work.token_k + piece.key;
      outer = is_paged ? piece.page : (a_.problem.varlen.cu_seqlens_k != nullptr ? 0 : work.batch);
    }
    if constexpr (!Config::kInterleaved) {
      copy_box_4d(tile + (slice_ * Config::kTileN + offset_) * Config::kSliceColumns, &map, full,
                  slice_ * Config::kSliceColumns, row, work.kv_head, outer);
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
  const BlockIterator* iterators_;
  int slice_;
  int offset_;  // keys of this lane's piece into the tile
  RingPosition<Config::kStagesK> k_{1};
  RingPosition<Config::kStagesV> v_{1};
  RingPosition<Config::kStagesQ> q_{1};
  RingPosition<Config::kWorkSlots> work_{0};
  RingPosition<Config::kCheckSlots> check_{1};
};

}  // namespace attnsieve::sm90
