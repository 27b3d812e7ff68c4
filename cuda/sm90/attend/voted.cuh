// One warpgroup's loop over the tiles of a work item with a vote on each (mainloop.cuh, BLASST): S
// = Q K^T -> mask -> vote -> for a kept tile online softmax, O += P V.
#pragma once

#include "cuda/sm90/attend/products.cuh"
#include "cuda/sm90/attend/votes.cuh"

namespace attnsieve::sm90 {

template <class Config>
class VotedMainloop : public AttendProducts<Config> {
 public:
  using Base = AttendProducts<Config>;
  using typename Base::FragmentO, typename Base::FragmentP, typename Base::FragmentS,
      typename Base::SkipPolicy, typename Base::Softmax;
  using Ballot = attnsieve::sm90::Ballot<Config>;
  using Base::issue_qk, Base::isolate, Base::uniform, Base::rows_of, Base::round_weights,
      Base::rescale_output, Base::settle, Base::smem_, Base::scale_log2_, Base::warpgroup_,
      Base::k_, Base::v_, Base::votes_;

  using Base::Base;

  template <class Feed>
  __device__ void run(const Work& work, SkipPolicy& policy, Feed&, FragmentO& acc_o,
                      Softmax& softmax) {
    Base::start_item(acc_o);
    if (work.tiles == 0) return;
    if constexpr (Config::kSteps == 1) {
      run_voted(work, policy, acc_o, softmax);
    } else {
      run_voted_steps(work, policy, acc_o, softmax);
    }
  }

 private:
  // In two loops. After a skipped tile only scores are computed;
  // after a kept one its P V runs under the next Q K^T. Tiles with masks take the first.
  __device__ void run_voted(const Work& work, SkipPolicy& policy, FragmentO& acc_o,
                            Softmax& softmax) {
    FragmentS acc_s;
    FragmentP weights;
    const auto scores = rows_columns<Config::kStepKeys>(acc_s, 0);
    Ballot ballot(rows_of(work), policy, smem_.votes[warpgroup_]);
    int left = work.tiles;
#pragma unroll 1
    while (left > 0) {
      int flags;
      bool kept;
#pragma unroll 1
      do {
        const int stage = uniform(k_.slot);
        smem_.k_full[k_.slot].wait(k_.phase);
        issue_qk(acc_s, stage);
        flags = smem_.k_record[k_.slot].flags;
        --left;
        warpgroup_wait<0>();
        warpgroup_fence_operand(acc_s);
        kept = flags == 0 ? decide(acc_s, ballot, true)
                          : decide_masked(acc_s, ballot, acc_o, work, flags);
      } while (!kept && left > 0);
      if (!kept) break;
      float rescale[2];
      bool moved = begin_row(softmax, 0, acc_s, ballot, rescale);
      moved |= begin_row(softmax, 1, acc_s, ballot, rescale);
      if (moved) rescale_output(acc_o, rescale);
      softmax.weigh(0, scores);
      softmax.weigh(1, scores);
      round_weights(acc_s, weights);
      ballot.raise();
      v_ = ballot.at;
      if ((flags & Config::kCheckedTile) != 0) isolate(acc_o, work, true);

#pragma unroll 1
      while (left > 0) {
        const int k_stage = uniform(k_.slot);
        const int v_stage = uniform(Base::value_stage());
        if (await_keys() != 0) break;
        const Order order(left);
        overlap_products(acc_s, weights, acc_o, k_stage, v_stage);
        --left;
        take_scores(ballot);
        // The tile will be kept, like the one before: row 0 is weighed before the vote is known.
        const Softmax before = softmax;
        ballot.lane_max[0] = lane_maximum<Config>(acc_s, 0, 0);
        moved = begin_row(softmax, 0, acc_s, ballot, rescale);
        softmax.weigh(0, scores);
        ballot.lane_max[1] = lane_maximum<Config>(acc_s, 0, 1);
        kept = confer(ballot, __any_sync(0xffffffffu, !(ballot.lane_max[0] < ballot.limit[0]) |
                                                          !(ballot.lane_max[1] < ballot.limit[1])));
        if (!kept) {
          softmax = before;
          break;
        }
        moved |= begin_row(softmax, 1, acc_s, ballot, rescale);
        order.complete(softmax.row_sum[0]);
        warpgroup_wait<0>();
        warpgroup_fence_operand(acc_o);
        release(smem_.v_empty[v_.slot], ballot);
        if (moved) rescale_output(acc_o, rescale);
        softmax.weigh(1, scores);
        ballot.raise();
        round_weights(acc_s, weights);
        v_ = ballot.at;
      }
      if (kept) {
        smem_.v_full[v_.slot].wait(v_.phase);
        Base::template issue_pv<0>(weights, acc_o, Base::value_stage());
      } else {
        ++ballot.skipped;
        release(smem_.v_empty[ballot.at.slot], ballot);
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc_o);
      release(smem_.v_empty[v_.slot], ballot);
    }
    policy.count(ballot.skipped - ballot.unseen, work.tiles - ballot.unseen);
  }

  // Q K^T of the next tile and P V of the one kept last, until the scores are complete.
  __device__ void overlap_products(FragmentS& acc_s, FragmentP& weights, FragmentO& acc_o,
                                   int k_stage, int v_stage) {
    issue_qk(acc_s, k_stage);
    smem_.v_full[v_.slot].wait(v_.phase);
    Base::template issue_pv<0>(weights, acc_o, v_stage);
    warpgroup_wait<1>();
    warpgroup_fence_operand(acc_s);
  }

  // Exponents of a row whose maximum in the lane is known. Returns whether a base moved.
  __device__ bool begin_row(Softmax& softmax, int row, FragmentS& acc_s, const Ballot& ballot,
                            float (&rescale)[2]) const {
    const float greatest = softmax.exponent(row, ballot.lane_max[row], scale_log2_);
    softmax.relate(row, rows_columns<Config::kStepKeys>(acc_s, 0), scale_log2_);
    return settle(softmax, row, 0, acc_s, greatest, rescale[row]);
  }

  // Two softmax steps of a tile, one after the other; values are used right after the vote.
  __device__ void run_voted_steps(const Work& work, SkipPolicy& policy, FragmentO& acc_o,
                                  Softmax& softmax) {
    Ballot ballot(rows_of(work), policy, smem_.votes[warpgroup_]);
#pragma unroll 1
    for (int left = work.tiles; left > 0; --left) {
      FragmentS acc_s;
      const int flags = await_keys();
      issue_qk(acc_s, k_.slot);
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc_s);
      const bool kept = flags == 0 ? decide(acc_s, ballot, true)
                                   : decide_masked(acc_s, ballot, acc_o, work, flags);
      if (!kept) continue;
      v_ = ballot.at;
      if ((flags & Config::kCheckedTile) != 0) isolate(acc_o, work, true);
      smem_.v_full[v_.slot].wait(v_.phase);
      // Besides saving the work on a step of padding, the branch keeps the weights of the second
      // step from being formed during the first, for which there are no registers.
      if ((flags & Config::kPaddedStep) == 0) attend_step<0>(acc_s, acc_o, softmax);
      attend_step<1>(acc_s, acc_o, softmax);
      ballot.raise();
      release(smem_.v_empty[v_.slot], ballot);
    }
    policy.count(ballot.skipped - ballot.unseen, work.tiles - ballot.unseen);
  }

  // Waits for the keys of the next tile. Its flags.
  __device__ int await_keys() {
    smem_.k_full[k_.slot].wait(k_.phase);
    return smem_.k_record[k_.slot].flags;
  }

  // Gives a stage back for the warp.
  static __device__ void release(TransactionBarrier& empty, const Ballot& ballot) {
    __syncwarp();
    empty.arrive_if(ballot.speaks());
  }
  // Takes a tile's scores, which are complete and masked: gives its keys back, and is the next to
  // vote.
  __device__ void take_scores(Ballot& ballot) {
    release(smem_.k_empty[k_.slot], ballot);
    k_.advance();
    ballot.at = votes_;
    votes_.advance();
  }

  // Whether a tile is kept, most likely not: all of its scores are compared, then the warps confer.
  // A tile that no row may see is not. What is skipped is given back, unless there is more to do.
  __device__ bool decide(FragmentS& acc_s, Ballot& ballot, bool seen, bool done = true) {
    take_scores(ballot);
    ballot.lane_max[0] = lane_tile_maximum(acc_s, 0);
    ballot.lane_max[1] = lane_tile_maximum(acc_s, 1);
    const bool mine =
        seen & (!(ballot.lane_max[0] < ballot.limit[0]) | !(ballot.lane_max[1] < ballot.limit[1]));
    const bool kept = named_barrier_any(kWarpgroupBarrier + warpgroup_, kWarpgroupThreads, mine);
    ballot.cast(kept);
    smem_.v_empty[ballot.at.slot].arrive_if(ballot.speaks() & !kept & done);
    ballot.skipped += !kept;
    return kept;
  }

  // The same for a tile with masks, whose values may have to be looked through.
  __device__ bool decide_masked(FragmentS& acc_s, Ballot& ballot, FragmentO& acc_o,
                                const Work& work, int flags) {
    const bool seen = mask_tile<Config>(acc_s, smem_.k_record[k_.slot], work, rows_of(work));
    if (!seen) ++ballot.unseen;
    const bool checked = (flags & Config::kCheckedTile) != 0;
    const bool kept = decide(acc_s, ballot, seen, !checked);
    if (!kept && checked) {
      v_ = ballot.at;
      isolate(acc_o, work, false);
      release(smem_.v_empty[v_.slot], ballot);
    }
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

  template <int kStep>
  __device__ void attend_step(FragmentS& acc_s, FragmentO& acc_o, Softmax& softmax) {
    constexpr int kRegisters = Config::kStepKeys / 2;
    const auto scores = rows_columns<Config::kStepKeys>(acc_s, kStep * kRegisters);
    float rescale[2];
    bool moved = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      softmax.relate(row, scores, scale_log2_);
      moved |= settle(softmax, row, kStep, acc_s, positive_maximum<Config>(acc_s, kStep, row),
                      rescale[row]);
      softmax.weigh(row, scores);
    }
    if (moved) rescale_output(acc_o, rescale);
    FragmentP weights;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      weights(i) = static_cast<typename Base::Element>(acc_s(kStep * kRegisters + i));
    }
    Base::template issue_pv<kStep>(weights, acc_o, Base::value_stage());
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc_o);
  }
};

}  // namespace attnsieve::sm90
