// One warpgroup's loop over the tiles of a work item: S = Q K^T -> mask -> online softmax ->
// O += P V, with the next S issued before the last P V. Touches no global memory.
//
// Order of a tile, pinned (order.cuh) where ptxas chooses another: maximum of row 0; its weights,
// under which the maximum of row 1 is found; the wait for P V of the tile before, which gives V
// back; the weights of row 1, under which O is rescaled and the weights are rounded.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "cuda/common/softmax.cuh"
#include "cuda/sm90/attend/isolate.cuh"
#include "cuda/sm90/attend/order.cuh"
#include "cuda/sm90/attend/rows.cuh"
#include "cuda/sm90/attend/votes.cuh"

namespace attnsieve::sm90 {

using namespace cute;

// Named barriers: one per warpgroup, one per warpgroup for its turn at the tensor cores, one of all
// consumers. 0 is __syncthreads.
inline constexpr int kWarpgroupBarrier = 1;
inline constexpr int kTurnBarrier = 4;
inline constexpr int kConsumerBarrier = 8;

template <class Config>
class AttendMainloop {
 public:
  using SkipPolicy = typename Config::SkipPolicy;
  using Element = typename Config::Element;
  using SharedStorage = typename Config::SharedStorage;
  using MmaQK = typename Config::MmaQK;
  using MmaPV = typename Config::MmaPV;
  using FragmentO =
      decltype(partition_fragment_C(MmaPV{}, Shape<Int<kWarpgroupRows>, Int<Config::kHeadDim>>{}));
  using FragmentS =
      decltype(partition_fragment_C(MmaQK{}, Shape<Int<kWarpgroupRows>, Int<Config::kTileN>>{}));
  // The weights of a softmax step in the order of the A operand: what the accumulator of S holds,
  // rounded.
  using FragmentP =
      decltype(make_tensor<Element>(Shape<Shape<_2, _2, _2>, _1, Int<Config::kStepKeys / 16>>{}));
  using Softmax = OnlineSoftmax<2>;
  using Ballot = attnsieve::sm90::Ballot<Config>;

  __device__ AttendMainloop(const AttendArguments& arguments, SharedStorage& smem)
      : a_(arguments),
        smem_(smem),
        scale_log2_(arguments.problem.softmax_scale * kLog2e),
        warpgroup_(Config::kWarpgroups == 1 ? 0 : cutlass::canonical_warp_group_idx()) {
    if (kTakesTurns && warpgroup_ == 1) pass_turn();
  }
  // Takes the turn that is left over.
  __device__ void finish() const {
    if (kTakesTurns && warpgroup_ == 0) await_turn();
  }

  // The query rows of this warpgroup: 64 from `begin` on, those from `end` on do not exist.
  __device__ Rows rows_of(const Work& work) const {
    const int warpgroup = opaque_thread() / kWarpgroupThreads;
    const int head = work.head + (a_.pack_heads ? warpgroup : 0);
    return {head, work.row + (a_.pack_heads ? 0 : warpgroup * kWarpgroupRows),
            head < work.head_end ? work.seqlen_q : 0};
  }

  // Stage of Q that belongs to the current item; release_queries() moves on.
  __device__ int query_tile() const { return q_.slot * Config::kWarpgroups + warpgroup_; }
  __device__ void release_queries() {
    release(smem_.q_empty[query_tile()]);
    q_.advance();
  }

  template <class Feed>
  __device__ void run(const Work& work, SkipPolicy& policy, Feed& feed, FragmentO& acc_o,
                      Softmax& softmax) {
    smem_.q_full[query_tile()].wait(q_.phase);
    clear(acc_o);
    if (work.tiles == 0) return;
    if constexpr (!Config::kVoted) {
      run_overlapped(work, feed, acc_o, softmax);
    } else if constexpr (Config::kSteps == 1) {
      run_voted(work, policy, acc_o, softmax);
    } else {
      run_voted_steps(work, policy, acc_o, softmax);
    }
  }

 private:
  // S of the next tile is computed while O takes the values of this one.
  template <class Feed>
  __device__ void run_overlapped(const Work& work, Feed& feed, FragmentO& acc_o, Softmax& softmax) {
    static_assert(Config::kSteps == 1);
    FragmentS acc_s;
    FragmentP weights;

    smem_.k_full[k_.slot].wait(k_.phase);
    issue_qk(acc_s);
    feed.prepare();
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc_s);
    const int tiles = work.tiles;
    int flags = smem_.k_record[k_.slot].flags;
    if ((flags & Config::kMaskedTile) != 0)
      mask_tile<Config>(acc_s, smem_.k_record[k_.slot], work, rows_of(work));
    release_keys();
    feed.refill();
    const auto scores = rows_columns<Config::kStepKeys>(acc_s, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.weigh(half, scores, maximum<Config>(acc_s, 0, half), scale_log2_);
    }
    round_weights(acc_s, weights);
    if ((flags & Config::kCheckedTile) != 0) isolate(acc_o, work, true);

#pragma unroll 1
    for (int left = tiles - 1; left > 0; --left) {
      const Order order(left);
      smem_.k_full[k_.slot].wait(k_.phase);
      flags = smem_.k_record[k_.slot].flags;
      if constexpr (kTakesTurns) await_turn();
      issue_qk(acc_s);
      smem_.v_full[v_.slot].wait(v_.phase);
      issue_pv<0>(weights, acc_o);
      if constexpr (kTakesTurns) pass_turn();
      feed.prepare();
      warpgroup_wait<1>();
      warpgroup_fence_operand(acc_s);
      if ((flags & Config::kMaskedTile) != 0)
        mask_tile<Config>(acc_s, smem_.k_record[k_.slot], work, rows_of(work));
      release_keys();
      feed.refill();
      if constexpr (!kPinned) {
        const float maxima[2] = {maximum<Config>(acc_s, 0, 0), maximum<Config>(acc_s, 0, 1)};
        const float rescale[2] = {softmax.weigh(0, scores, maxima[0], scale_log2_),
                                  softmax.weigh(1, scores, maxima[1], scale_log2_)};
        warpgroup_wait<0>();
        warpgroup_fence_operand(acc_o);
        release_values();
        round_weights(acc_s, weights);
        rescale_output(acc_o, rescale);
      } else {
        auto row0 = softmax.begin(0, maximum<Config>(acc_s, 0, 0), scale_log2_);
        scores(1, 0) = order.after(scores(1, 0), row0.base);
        softmax.weigh(0, row0, scores, scale_log2_);
        auto row1 = softmax.begin(1, maximum<Config>(acc_s, 0, 1), scale_log2_);
        order.complete(softmax.row_sum[0]);
        warpgroup_wait<0>();
        warpgroup_fence_operand(acc_o);
        release_values();
        row1.base = order.after(row1.base, acc_o(0));
        softmax.weigh(1, row1, scores, scale_log2_);
        round_weights(acc_s, weights);
        rescale_output(acc_o, {row0.rescale, row1.rescale});
      }
      if ((flags & Config::kCheckedTile) != 0) isolate(acc_o, work, true);
    }
    smem_.v_full[v_.slot].wait(v_.phase);
    issue_pv<0>(weights, acc_o);
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc_o);
    release_values();
  }

  // The same with a vote on every tile. After a kept tile its P V runs under the next Q K^T; after a
  // skipped one only scores are computed. Tiles with masks take the outer loop: the inner one is short.
  __device__ void run_voted(const Work& work, SkipPolicy& policy, FragmentO& acc_o,
                            Softmax& softmax) {
    FragmentS acc_s;
    FragmentP weights;
    const auto scores = rows_columns<Config::kStepKeys>(acc_s, 0);
    Ballot ballot(rows_of(work), policy, smem_.votes[warpgroup_]);
    int left = work.tiles;
#pragma unroll 1
    while (left > 0) {
      const int flags = await_keys();
      issue_qk(acc_s);
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc_s);
      --left;
      bool seen = true;
      if ((flags & Config::kMaskedTile) != 0) {
        seen = mask_tile<Config>(acc_s, smem_.k_record[k_.slot], work, rows_of(work));
        if (!seen) ++ballot.unseen;
      }
      if (!decide(acc_s, ballot, seen)) {
        skip_values(ballot, acc_o, work, flags);
        continue;
      }
      float rescale[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        rescale[row] = softmax.weigh(row, scores, quad_max(ballot.lane_max[row]), scale_log2_);
      }
      ballot.raise(softmax);
      round_weights(acc_s, weights);
      rescale_output(acc_o, rescale);
      v_ = ballot.at;
      if ((flags & Config::kCheckedTile) != 0) isolate(acc_o, work, true);

      bool kept = true;
#ifndef NO_PEEL
      // The next tile's fate is open: its vote comes first.
      if (left > 0 && await_keys() == 0) {
        overlap_products(acc_s, weights, acc_o);
        --left;
        kept = decide(acc_s, ballot, true);
        if (kept) {
          const Order order(left + 1);
          auto row0 = softmax.begin(0, quad_max(ballot.lane_max[0]), scale_log2_);
          softmax.weigh(0, row0, scores, scale_log2_);
          auto row1 = softmax.begin(1, quad_max(ballot.lane_max[1]), scale_log2_);
          finish_tile(order, ballot, softmax, row0, row1, acc_s, weights, acc_o);
        }
      }
#endif
#pragma unroll 1
      while (kept && left > 0 && await_keys() == 0) {
        const Order order(left);
        overlap_products(acc_s, weights, acc_o);
        --left;
        take_scores(ballot);
        // The tile will be kept, like the one before: row 0 is weighed before the vote is known.
        const Softmax before = softmax;
        const float row0_lane_max = lane_maximum<Config>(acc_s, 0, 0);
        auto row0 = softmax.begin(0, quad_max(row0_lane_max), scale_log2_);
        scores(1, 0) = order.after(scores(1, 0), row0.base);
        softmax.weigh(0, row0, scores, scale_log2_);
        const float row1_lane_max = lane_maximum<Config>(acc_s, 0, 1);
        auto row1 = softmax.begin(1, quad_max(row1_lane_max), scale_log2_);
        kept = confer(ballot, __any_sync(0xffffffffu, !(row0_lane_max < ballot.limit[0]) |
                                                          !(row1_lane_max < ballot.limit[1])));
        if (!kept) {
          softmax = before;
          break;
        }
        finish_tile(order, ballot, softmax, row0, row1, acc_s, weights, acc_o);
      }
      if (kept) {
        smem_.v_full[v_.slot].wait(v_.phase);
        issue_pv<0>(weights, acc_o);
      } else {
        ++ballot.skipped;
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc_o);
      release_values();
    }
    policy.count(ballot.skipped - ballot.unseen, work.tiles - ballot.unseen);
  }

  // Q K^T of the next tile and P V of the one kept last, until the scores are complete.
  __device__ void overlap_products(FragmentS& acc_s, FragmentP& weights, FragmentO& acc_o) {
    issue_qk(acc_s);
    smem_.v_full[v_.slot].wait(v_.phase);
    issue_pv<0>(weights, acc_o);
    warpgroup_wait<1>();
    warpgroup_fence_operand(acc_s);
  }

  // From the weights of row 0 to those of the tile, and O relative to its maxima.
  __device__ void finish_tile(const Order& order, Ballot& ballot, Softmax& softmax,
                              typename Softmax::Row& row0, typename Softmax::Row& row1,
                              FragmentS& acc_s, FragmentP& weights, FragmentO& acc_o) {
    order.complete(softmax.row_sum[0]);
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc_o);
    release_values();
    row1.base = order.after(row1.base, acc_o(0));
    softmax.weigh(1, row1, rows_columns<Config::kStepKeys>(acc_s, 0), scale_log2_);
    ballot.raise(softmax);
    round_weights(acc_s, weights);
    rescale_output(acc_o, {row0.rescale, row1.rescale});
    v_ = ballot.at;
  }

  // Two softmax steps of a tile, one after the other; values are used right after the vote.
  __device__ void run_voted_steps(const Work& work, SkipPolicy& policy, FragmentO& acc_o,
                                  Softmax& softmax) {
    Ballot ballot(rows_of(work), policy, smem_.votes[warpgroup_]);
#pragma unroll 1
    for (int left = work.tiles; left > 0; --left) {
      FragmentS acc_s;
      const int flags = await_keys();
      issue_qk(acc_s);
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc_s);
      bool seen = true;
      if ((flags & Config::kMaskedTile) != 0) {
        seen = mask_tile<Config>(acc_s, smem_.k_record[k_.slot], work, rows_of(work));
        if (!seen) ++ballot.unseen;
      }
      if (!decide(acc_s, ballot, seen)) {
        skip_values(ballot, acc_o, work, flags);
        continue;
      }
      v_ = ballot.at;
      if ((flags & Config::kCheckedTile) != 0) isolate(acc_o, work, true);
      smem_.v_full[v_.slot].wait(v_.phase);
      // Besides saving the work on a step of padding, the branch keeps the weights of the second
      // step from being formed during the first, for which there are no registers.
      if ((flags & Config::kPaddedStep) == 0) attend_step<0>(acc_s, acc_o, softmax);
      attend_step<1>(acc_s, acc_o, softmax);
      ballot.raise(softmax);
      release_values();
    }
    policy.count(ballot.skipped - ballot.unseen, work.tiles - ballot.unseen);
  }

  // Waits for the keys of the next tile. Its flags.
  __device__ int await_keys() {
    smem_.k_full[k_.slot].wait(k_.phase);
    return smem_.k_record[k_.slot].flags;
  }

  // Takes a tile's scores, which are complete and masked: gives its keys back, and is the next to vote.
  __device__ void take_scores(Ballot& ballot) {
    release_keys();
    ballot.at = votes_;
    votes_.advance();
  }

  // Whether a tile is kept, most likely not: all of its scores are compared, then the warps confer. A
  // tile that no row may see is not.
  __device__ bool decide(FragmentS& acc_s, Ballot& ballot, bool seen) {
    take_scores(ballot);
    ballot.lane_max[0] = lane_tile_maximum(acc_s, 0);
    ballot.lane_max[1] = lane_tile_maximum(acc_s, 1);
    const bool mine =
        seen & (!(ballot.lane_max[0] < ballot.limit[0]) | !(ballot.lane_max[1] < ballot.limit[1]));
    const bool kept = named_barrier_any(kWarpgroupBarrier + warpgroup_, kWarpgroupThreads, mine);
    ballot.cast(kept);
    return kept;
  }

  // Casts the warp's vote and learns the warpgroup's, at once where the warp's decides.
  __device__ bool confer(const Ballot& ballot, bool veto) {
    ballot.cast(veto);
    Verdict verdict = veto ? Verdict::kKept : Verdict::kOpen;
    while (verdict == Verdict::kOpen) {
      verdict = read_votes(smem_.votes[warpgroup_][ballot.at.slot], ballot.at.phase);
    }
    return verdict == Verdict::kKept;
  }
  static __device__ float lane_tile_maximum(FragmentS& acc_s, int row) {
    const float first = lane_maximum<Config>(acc_s, 0, row);
    if constexpr (Config::kSteps == 1) return first;
    return max_nan(first, lane_maximum<Config>(acc_s, 1, row));
  }

  // The values of a tile that is not kept: nothing to give back, but where they are looked through.
  __device__ void skip_values(Ballot& ballot, FragmentO& acc_o, const Work& work, int flags) {
    ++ballot.skipped;
    if ((flags & Config::kCheckedTile) == 0) return;
    v_ = ballot.at;
    isolate(acc_o, work, false);
    smem_.v_full[v_.slot].wait(v_.phase);
    release_values();
  }

  static __device__ void release(TransactionBarrier& empty) {
    if constexpr (Config::kSelfFed) return;  // the feed has a barrier of its own
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) empty.arrive();
  }

  // Starts S = Q K^T of the current K stage.
  __device__ void issue_qk(FragmentS& acc_s) {
    MmaQK mma;
    const auto thread_mma = mma.get_slice(threadIdx.x % kWarpgroupThreads);
    const auto sQ = make_tensor(make_smem_ptr(smem_.q), typename Config::LayoutQ{});
    const auto sK = make_tensor(make_smem_ptr(smem_.k), typename Config::LayoutK{});
    const auto tSrQ = thread_mma.partition_fragment_A(sQ);  // (MMA, M, K, tile)
    const auto tSrK = thread_mma.partition_fragment_B(sK);  // (MMA, N, K, stage)
    int query = query_tile();
    // Opaque, or the descriptors of all slices would be kept, for which there are no registers.
    if constexpr (Config::kHeadDim > 128) asm volatile("" : "+r"(query));
    warpgroup_fence_operand(acc_s);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
    for (int chunk = 0; chunk < size<2>(tSrK); ++chunk) {
      cute::gemm(mma, tSrQ(_, _, chunk, query), tSrK(_, _, chunk, k_.slot), acc_s);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  }

  // Starts O += P V over the keys of one softmax step of the current V stage.
  template <int kStep>
  __device__ void issue_pv(FragmentP& weights, FragmentO& acc_o) {
    MmaPV mma;
    const auto thread_mma = mma.get_slice(threadIdx.x % kWarpgroupThreads);
    const auto sV = make_tensor(make_smem_ptr(smem_.v), typename Config::LayoutV{});
    const auto tOrV = thread_mma.partition_fragment_B(sV);  // (MMA, D, K, stage)
    warpgroup_fence_operand(acc_o);
    warpgroup_fence_operand(weights);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::One;
#pragma unroll
    for (int chunk = 0; chunk < Config::kStepKeys / 16; ++chunk) {
      cute::gemm(mma, weights(_, _, chunk),
                 tOrV(_, _, kStep * Config::kStepKeys / 16 + chunk, value_stage()), acc_o);
    }
    warpgroup_commit_batch();
  }

  __device__ int value_stage() const {
    if constexpr (Config::kVoted) return v_.slot % Config::kStagesV;
    return v_.slot;
  }
  __device__ void release_keys() {
    release(smem_.k_empty[k_.slot]);
    k_.advance();
  }
  __device__ void release_values() {
    release(smem_.v_empty[value_stage()]);
    if constexpr (!Config::kVoted) v_.advance();
  }

  static __device__ void round_weights(const FragmentS& acc_s, FragmentP& weights) {
#pragma unroll
    for (int i = 0; i < size(weights); ++i) weights(i) = static_cast<Element>(acc_s(i));
  }

  template <int kStep>
  __device__ void attend_step(FragmentS& acc_s, FragmentO& acc_o, Softmax& softmax) {
    constexpr int kRegisters = Config::kStepKeys / 2;
    float rescale[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      rescale[row] = softmax.weigh(row, rows_columns<Config::kStepKeys>(acc_s, kStep * kRegisters),
                                   maximum<Config>(acc_s, kStep, row), scale_log2_);
    }
    rescale_rows(rows_columns<Config::kHeadDim>(acc_o, 0), rescale);
    FragmentP weights;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      weights(i) = static_cast<Element>(acc_s(kStep * kRegisters + i));
    }
    issue_pv<kStep>(weights, acc_o);
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc_o);
  }

  // Where the maxima mostly stand, most tiles leave the output as it is.
  static __device__ void rescale_output(FragmentO& acc_o, const float (&rescale)[2]) {
    if (Config::kWarpgroups == 1 &&
        !__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
      return;
    }
    rescale_rows(rows_columns<Config::kHeadDim>(acc_o, 0), rescale);
  }

  // Keeps non-finite values of V from the rows that do not see their keys. All warpgroups come
  // here for the same tiles; one that skips the tile adds nothing.
  __device__ void isolate(FragmentO& acc_o, const Work& work, bool adds) {
    if (!found_non_finite()) return;
    smem_.v_full[v_.slot].wait(v_.phase);
    const int row = rows_of(work).begin;
    const int thread = opaque_thread();
    const int rows[2] = {row + row_of(thread, 0), row + row_of(thread, 1)};
    if (adds) add_non_finite<Config>(smem_, value_stage(), work, rows, acc_o);
    named_barrier_sync(kConsumerBarrier, Config::kConsumerThreads);
    zero_non_finite<Config>(smem_, value_stage());
    fence_shared_for_async();
    named_barrier_sync(kConsumerBarrier, Config::kConsumerThreads);
  }

  // Whether the current V stage holds a NaN or Inf.
  __device__ bool found_non_finite() {
    if constexpr (Config::kSelfFed) {
      smem_.v_full[v_.slot].wait(v_.phase);
      const bool found =
          holds_non_finite<Config, kWarpgroupThreads>(smem_, value_stage(), threadIdx.x);
      return named_barrier_any(kWarpgroupBarrier, kWarpgroupThreads, found);
    } else {
      smem_.check_done[check_.slot].wait(check_.phase);
      const bool found = smem_.check[check_.slot].non_finite != 0;
      check_.advance();
      return found;
    }
  }

  // The warpgroups issue their MMAs in turn, so that one computes weights while the other's run.
  __device__ void await_turn() const {
    named_barrier_sync(kTurnBarrier + warpgroup_, Config::kConsumerThreads);
  }
  __device__ void pass_turn() const {
    named_barrier_arrive(kTurnBarrier + 1 - warpgroup_, Config::kConsumerThreads);
  }
  static constexpr bool kTakesTurns = !Config::kVoted && Config::kWarpgroups == 2;
  // Where the weights cost more than the MMAs, or other CTAs of the SM fill the tensor cores
  // meanwhile, ptxas's order is the faster one.
  static constexpr bool kPinned = !Config::kSelfFed && Config::kHeadDim > 64;

  const AttendArguments& a_;
  SharedStorage& smem_;
  float scale_log2_;
  int warpgroup_;
  RingPosition<Config::kStagesK> k_{0};
  // Of the next tile; where tiles are voted on, of the one kept last, and of the next vote.
  RingPosition<Config::kValueSlots> v_{0};
  RingPosition<Config::kValueSlots> votes_{0};
  RingPosition<Config::kStagesQ> q_{0};
  RingPosition<Config::kCheckSlots> check_{0};
};

}  // namespace attnsieve::sm90
