// The warps that keep the rings full: one locates work items, one copies Q and the tiles of K, one
// the tiles of V. A single warp for K and V is too slow: it spends 85 % of a tile's time on issuing
// (H200, 2026-11-22, lists of 64-key boxes).
#pragma once

#include "cuda/sm90/attend/compose.cuh"
#include "cuda/sm90/attend/schedule.cuh"
#include "cuda/sm90/attend/votes.cuh"

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

// Copies the tiles of K (and Q) or of V. List entries are read two tiles ahead and page numbers one,
// so that no load is waited for where it starts.
template <class Config, class BlockIterator, Operand kOperand>
class TileProducer : TileComposer<Config, BlockIterator> {
  using Base = TileComposer<Config, BlockIterator>;
  using SharedStorage = typename Config::SharedStorage;
  using Piece = typename Base::Piece;
  using Base::a_, Base::smem_, Base::is_leader, Base::fetch, Base::resolve;
  static constexpr bool kKeys = kOperand == Operand::kKeys;
  static constexpr bool kVoted = Config::kVoted && !kKeys;
  static constexpr int kStages = kKeys ? Config::kStagesK : Config::kStagesV;
  // Tiles left when the next item is asked for: their time covers a counter, a list and a barrier.
  static constexpr int kTilesAhead = 4;

 public:
  __device__ TileProducer(const AttendArguments& arguments, SharedStorage& smem)
      : Base(arguments, smem, static_cast<int>(threadIdx.x) % kWarpThreads) {}

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
        load_tile(work, piece, tile == 0);
        piece = resolve(work, iterator, tile + 1, fetched[1 - kParity]);
      };
      if constexpr (!BlockIterator::kFetches) {
#pragma unroll 1
        for (int tile = 0; tile < work.tiles; ++tile) load(tile, cute::Int<0>{});
      } else {
        // Of the next even and the next odd tile. Moving a load's result from one register to
        // another would wait for it.
#pragma unroll 1
        for (int tile = 0; tile < work.tiles; tile += 2) {
          load(tile, cute::Int<0>{});
          if (tile + 1 < work.tiles) load(tile + 1, cute::Int<1>{});
        }
      }
    }
    if constexpr (kVoted) {
      // No copy is under way when the CTA ends.
      for (int stage = 0; stage < Config::kStagesV; ++stage) free_stage();
    }
    if constexpr (!kKeys) request_check(Config::kStagesV, 0, 0);
  }

 private:
  __device__ void announce_end() const {
    if (is_leader()) smem_.item_ending.arrive();
  }

  __device__ void load_queries(const Work& work) {
    const int lane = threadIdx.x % kWarpThreads;
    if (lane < Config::kWarpgroups) {
      const int tile = q_.slot * Config::kWarpgroups + lane;
      smem_.q_empty[tile].wait(q_.phase);
      Base::copy_queries(work, lane, tile);
    }
    q_.advance();
  }

  // Fills the next stage, this lane's piece among the others.
  __device__ void load_tile(const Work& work, Piece piece, bool first) {
    Base::check_page(&piece);
    const int flags = Base::inspect(work, piece);
    if constexpr (kVoted) return load_voted(work, piece, flags, first);
    if constexpr (Config::kVoted) follow_values();
    const int stage = position_.slot;
    (kKeys ? smem_.k_empty[stage] : smem_.v_empty[stage]).wait_idle(position_.phase);
    fill(work, piece, flags, stage, kKeys ? smem_.k_full[stage] : smem_.v_full[stage]);
    if (!kKeys && (flags & Config::kCheckedTile) != 0) {
      request_check(stage, stage, position_.phase ^ 1);  // the parity of this fill
    }
    position_.advance();
  }
  __device__ void fill(const Work& work, const Piece& piece, int flags, int stage,
                       TransactionBarrier& full) const {
    Base::template fill<kOperand>(work.kv_head, Base::coordinates(work, piece), piece.key, flags,
                                  stage, full);
  }

  // V of a tile that no warpgroup keeps is not copied. Where the tile that had the stage before was
  // kept, the copy is ahead of the votes, as it has to be where little is skipped.
  __device__ void load_voted(const Work& work, const Piece& piece, int flags, bool first) {
    const int stage = votes_.slot % Config::kStagesV;
    TransactionBarrier& full = smem_.v_full[votes_.slot];
    const bool checked = (flags & Config::kCheckedTile) != 0;
    free_stage();
    if (first || checked || kept_before_ || is_kept()) {
      fill(work, piece, flags, stage, full);
      if (checked) request_check(stage, votes_.slot, votes_.phase);
    } else if (is_leader()) {
      full.arrive();
    }
    votes_.advance();
  }

  // Waits until all warpgroups are done with the tile whose stage is next, and its copy has ended.
  __device__ void free_stage() {
    if (ahead_ < Config::kStagesV) {
      ++ahead_;
      return;
    }
    smem_.v_empty[done_.slot].wait_idle(done_.phase);
    smem_.v_full[done_.slot].wait_idle(done_.phase);
    uint32_t votes = 0;
#pragma unroll
    for (int i = 0; i < Config::kWarpgroups; ++i) votes |= read_word(smem_.votes[i][done_.slot]);
    kept_before_ = has_veto(votes);
    done_.advance();
  }

  // Whether a warpgroup keeps the next tile: known once one does, or none.
  __device__ bool is_kept() const {
    while (true) {
      bool open = false;
#pragma unroll
      for (int i = 0; i < Config::kWarpgroups; ++i) {
        const Verdict verdict = read_votes(smem_.votes[i][votes_.slot], votes_.phase);
        if (verdict == Verdict::kKept) return true;
        open |= verdict == Verdict::kOpen;
      }
      if (!open) return false;
    }
  }

  // Keeps the warp that copies V within the ring of votes: who skips a tile does not wait for it.
  __device__ void follow_values() {
    if (ahead_ < Config::kVotesBehind) {
      ++ahead_;
      return;
    }
    smem_.v_full[done_.slot].wait_idle(done_.phase);
    done_.advance();
  }

  // Asks the checking warp to look for NaN and Inf in a V stage; a stage past the last ends them.
  __device__ void request_check(int stage, int slot, uint32_t parity) {
    if (is_leader()) {
      smem_.check[check_.slot] = {stage, slot, parity, 0};
      smem_.check_full[check_.slot].arrive();
    }
    check_.advance();
  }

  RingPosition<kStages> position_{1};
  // Where tiles are voted on: the next tile, the one that is waited for, and what is between them,
  // until that is as much as it will be.
  RingPosition<Config::kVoteSlots> votes_{0};
  RingPosition<Config::kVoteSlots> done_{0};
  int ahead_ = 0;
  bool kept_before_ = false;
  RingPosition<Config::kStagesQ> q_{1};
  RingPosition<Config::kWorkSlots> work_{0};
  RingPosition<Config::kCheckSlots> check_{1};
};

}  // namespace attnsieve::sm90
