// What a warpgroup's loops over the tiles of a work item are made of: its place in the rings, the
// two products, and how a stage is given back. Touches no global memory.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "cuda/sm90/attend/isolate.cuh"
#include "cuda/sm90/attend/order.cuh"
#include "cuda/sm90/attend/softmax.cuh"

namespace attnsieve::sm90 {

using namespace cute;

// Named barriers: one per warpgroup, one per warpgroup for its turn at the tensor cores, one of all
// consumers. 0 is __syncthreads.
inline constexpr int kWarpgroupBarrier = 1;
inline constexpr int kTurnBarrier = 4;
inline constexpr int kConsumerBarrier = 8;

template <class Config>
class AttendProducts {
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
  using Softmax = LazySoftmax;

  __device__ AttendProducts(const AttendArguments& arguments, SharedStorage& smem)
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

 protected:
  __device__ void start_item(FragmentO& acc_o) {
    smem_.q_full[query_tile()].wait(q_.phase);
    clear(acc_o);
  }

  static __device__ void release(TransactionBarrier& empty) {
    if constexpr (Config::kSelfFed) return; // the feed has a barrier of its own
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) empty.arrive();
  }

  // A stage, the same in all lanes, as ptxas then knows: descriptors of the MMAs are computed in
  // uniform registers, not moved there one by one. Best asked for ahead of a wait.
  static __device__ int uniform(int stage) { return __shfl_sync(0xffffffffu, stage, 0); }

  // Starts S = Q K^T of a K stage.
  __device__ void issue_qk(FragmentS& acc_s, int stage) {
    MmaQK mma;
    const auto thread_mma = mma.get_slice(threadIdx.x % kWarpgroupThreads);
    const auto sQ = make_tensor(make_smem_ptr(smem_.q), typename Config::LayoutQ{});
    const auto sK = make_tensor(make_smem_ptr(smem_.k), typename Config::LayoutK{});
    const auto tSrQ = thread_mma.partition_fragment_A(sQ); // (MMA, M, K, tile)
    const auto tSrK = thread_mma.partition_fragment_B(sK); // (MMA, N, K, stage)
    int query = query_tile();
    // Opaque, or the descriptors of all slices would be kept, for which there are no registers.
    if constexpr (Config::kHeadDim > 128) asm volatile("" : "+r"(query));
    warpgroup_fence_operand(acc_s);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
    for (int chunk = 0; chunk < size<2>(tSrK); ++chunk) {
      cute::gemm(mma, tSrQ(_, _, chunk, query), tSrK(_, _, chunk, stage), acc_s);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  }

  // Starts O += P V over the keys of one softmax step of a V stage.
  template <int kStep>
  __device__ void issue_pv(FragmentP& weights, FragmentO& acc_o, int stage) {
    MmaPV mma;
    const auto thread_mma = mma.get_slice(threadIdx.x % kWarpgroupThreads);
    const auto sV = make_tensor(make_smem_ptr(smem_.v), typename Config::LayoutV{});
    const auto tOrV = thread_mma.partition_fragment_B(sV); // (MMA, D, K, stage)
    warpgroup_fence_operand(acc_o);
    warpgroup_fence_operand(weights);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::One;
#pragma unroll
    for (int chunk = 0; chunk < Config::kStepKeys / 16; ++chunk) {
      cute::gemm(mma, weights(_, _, chunk),
                 tOrV(_, _, kStep * Config::kStepKeys / 16 + chunk, stage), acc_o);
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
    release(smem_.v_empty[v_.slot]);
    v_.advance();
  }

  // Row `row` of a step of exponents, of which the lane knows the greatest: the base moves where a
  // row of the warp needs it. Returns whether one did.
  static __device__ bool settle(Softmax& softmax, int row, int step, FragmentS& acc_s,
                                float greatest, float& rescale) {
    rescale = 1.0f;
    if (!__any_sync(0xffffffffu, softmax.exceeds(row, greatest))) return false;
    rescale =
        softmax.raise(row, rows_columns<Config::kStepKeys>(acc_s, step * Config::kStepKeys / 2),
                      lane_maximum<Config>(acc_s, step, row));
    return true;
  }

  static __device__ void round_weights(const FragmentS& acc_s, FragmentP& weights) {
#pragma unroll
    for (int i = 0; i < size(weights); ++i) weights(i) = static_cast<Element>(acc_s(i));
  }

  static __device__ void rescale_output(FragmentO& acc_o, const float (&rescale)[2]) {
    rescale_rows(rows_columns<Config::kHeadDim>(acc_o, 0), rescale);
  }

  // Keeps non-finite values of V from the rows that do not see their keys. All warpgroups come here
  // for the same tiles; one that skips the tile adds nothing.
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
