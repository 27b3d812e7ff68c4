// One warpgroup's loop over the tiles of a work item: S = Q K^T -> mask -> online softmax -> O += P
// V, with the next S issued before the last P V.
//
// Order of a tile, pinned (order.cuh) where ptxas chooses another: whether row 0 moves its base; its
// weights; whether row 1 does; the wait for P V of the tile before, which gives V back; the weights
// of row 1, under which the weights are rounded.
#pragma once

#include "cuda/sm90/attend/products.cuh"

namespace attnsieve::sm90 {

template <class Config>
class AttendMainloop : public AttendProducts<Config> {
 public:
  using Base = AttendProducts<Config>;
  using Base::rescale_output, Base::issue_qk, Base::release_keys, Base::release_values,
      Base::isolate, Base::await_turn, Base::pass_turn, Base::kTakesTurns, Base::rows_of,
      Base::round_weights, Base::settle, Base::smem_, Base::scale_log2_, Base::k_, Base::v_;
  using typename Base::FragmentO, typename Base::FragmentP, typename Base::FragmentS,
      typename Base::SkipPolicy, typename Base::Softmax;

  using Base::Base;

  template <class Feed>
  __device__ void run(const Work& work, SkipPolicy&, Feed& feed, FragmentO& acc_o,
                      Softmax& softmax) {
    static_assert(!Config::kVoted && Config::kSteps == 1);
    Base::start_item(acc_o);
    if (work.tiles == 0) return;
    FragmentS acc_s;
    FragmentP weights;

    smem_.k_full[k_.slot].wait(k_.phase);
    issue_qk(acc_s, k_.slot);
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
    float rescale[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      softmax.relate(row, scores, scale_log2_);
      settle(softmax, row, 0, acc_s, 0.0f, rescale[row]);
      softmax.weigh(row, scores);
    }
    round_weights(acc_s, weights);
    if ((flags & Config::kCheckedTile) != 0) isolate(acc_o, work, true);

#pragma unroll 1
    for (int left = tiles - 1; left > 0; --left) {
      const Order order(left);
      smem_.k_full[k_.slot].wait(k_.phase);
      flags = smem_.k_record[k_.slot].flags;
      if constexpr (kTakesTurns) await_turn();
      issue_qk(acc_s, k_.slot);
      smem_.v_full[v_.slot].wait(v_.phase);
      Base::template issue_pv<0>(weights, acc_o, v_.slot);
      if constexpr (kTakesTurns) pass_turn();
      feed.prepare();
      warpgroup_wait<1>();
      warpgroup_fence_operand(acc_s);
      if ((flags & Config::kMaskedTile) != 0)
        mask_tile<Config>(acc_s, smem_.k_record[k_.slot], work, rows_of(work));
      release_keys();
      feed.refill();
      softmax.relate(0, scores, scale_log2_);
      bool moved = settle(softmax, 0, 0, acc_s, positive_maximum<Config>(acc_s, 0, 0), rescale[0]);
      softmax.weigh(0, scores);
      softmax.relate(1, scores, scale_log2_);
      moved |= settle(softmax, 1, 0, acc_s, positive_maximum<Config>(acc_s, 0, 1), rescale[1]);
      if constexpr (kPinned) order.complete(softmax.row_sum[0]);
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc_o);
      release_values();
      if (moved) rescale_output(acc_o, rescale);
      softmax.weigh(1, scores);
      round_weights(acc_s, weights);
      if ((flags & Config::kCheckedTile) != 0) isolate(acc_o, work, true);
    }
    smem_.v_full[v_.slot].wait(v_.phase);
    Base::template issue_pv<0>(weights, acc_o, v_.slot);
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc_o);
    release_values();
  }

 private:
  // Where the weights cost more than the MMAs, or other CTAs of the SM fill the tensor cores
  // meanwhile, ptxas's order is the faster one.
  static constexpr bool kPinned = !Config::kSelfFed && Config::kHeadDim > 64;
};

}  // namespace attnsieve::sm90
