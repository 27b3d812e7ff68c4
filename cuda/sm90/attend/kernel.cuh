// Computes        out[b, h, i] = sum_j softmax_j(scale * q[b, h, i] . k[b, h / G, j]) v[b, h / G, j]
//                 over the keys j that the BlockIterator yields and the mask shows;
//                 lse[b, h, i] = ln sum_j exp(scale * q . k), the sink logit included.
// Roles           CTAs take work items blockIdx.x, then + gridDim.x, ... or from a counter:
//                 kWarpgroups x 64 query rows of one head, or 64 rows of kWarpgroups heads that
//                 share a list. One warpgroup per 64 rows computes. In a further warpgroup one warp
//                 copies Q and K, one V, one locates the items, and one looks for non-finite values
//                 in the V of masked tiles. A self-fed warpgroup (feed.cuh) is a CTA of one item and
//                 does all of that itself.
// Shared memory   Q of kStagesQ items (later their output), kStagesK tiles of K, kStagesV of V, in
//                 the swizzled layouts of wgmma; a record per tile, a ring of work items.
// Pipeline        ring        filled by          freed by
//                 work        locating warp      every consumer warp and both copying warps
//                 q           bulk copies        every warp of its warpgroup, after its epilogue
//                 k           bulk copies        every consumer warp, once S is complete
//                 v           bulk copies        every consumer warp, once O has taken it or the
//                                                warpgroup has skipped it
//                 votes       consumer warps     (read by the warpgroup and V's warp, votes.cuh)
//                 check       V's warp, checker  (a slot comes round after its V stage was freed)
//                 Full barriers of copies complete on bytes: always those of a whole tile, missing
//                 pieces are zeros from outside the tensor. A self-fed warpgroup frees K and V with
//                 one named barrier a tile instead.
// Invariants      row_max is -inf iff the row saw no finite logit. The tile visited first is the
//                 one with the last visible key: of the item's last row, where warpgroups share
//                 tiles of 64 keys, which are not voted on, of each warpgroup's otherwise. Steps
//                 advance in the same width whether or not tiles are voted on, so threshold 0 is
//                 bitwise equal to no threshold.
// Not handled     Backward.
#pragma once

#include "cuda/sm90/attend/epilogue.cuh"
#include "cuda/sm90/attend/feed.cuh"
#include "cuda/sm90/attend/iterator.cuh"
#include "cuda/sm90/attend/load.cuh"
#include "cuda/sm90/attend/mainloop.cuh"
#include "cuda/sm90/attend/voted.cuh"

namespace attnsieve::sm90 {

template <class Config>
__device__ void init_barriers(typename Config::SharedStorage& smem) {
  constexpr int kConsumerWarps = Config::kConsumerThreads / kWarpThreads;
  constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpThreads;
  const auto init = [](auto& full, auto& empty, int count, int fills, int frees) {
    for (int i = 0; i < count; ++i) {
      full[i].init(fills);
      empty[i].init(frees);
    }
  };
  init(smem.k_full, smem.k_empty, Config::kStagesK, 1, kConsumerWarps);
  for (TransactionBarrier& full : smem.v_full) full.init(1);
  for (TransactionBarrier& empty : smem.v_empty) empty.init(kConsumerWarps);
  init(smem.q_full, smem.q_empty, Config::kStagesQ * Config::kWarpgroups, 1, kWarpgroupWarps);
  if constexpr (Config::kVoted) {
    for (auto& votes : smem.votes) {
      for (uint32_t& word : votes) word = kNoVotes;
    }
  }
  if constexpr (Config::kSelfFed) return;
  init(smem.work_full, smem.work_empty, Config::kWorkSlots, 1, kConsumerWarps + 2);
  init(smem.check_full, smem.check_done, Config::kCheckSlots, 1, 1);
  smem.item_ending.init(1);
}

template <class Config>
using MainloopOf =
    std::conditional_t<Config::kVoted, VotedMainloop<Config>, AttendMainloop<Config>>;

template <class Config>
__device__ void consume(const AttendArguments& arguments, typename Config::SharedStorage& smem) {
  using Mainloop = MainloopOf<Config>;
  const AttendProblem& problem = arguments.problem;
  Mainloop mainloop(arguments, smem);
  ProducersFeed feed;
  RingPosition<Config::kWorkSlots> position(0);
  while (true) {
    smem.work_full[position.slot].wait(position.phase);
    const Work& work = smem.work[position.slot];
    if (work.tiles < 0) break;
    const Rows rows = mainloop.rows_of(work);
    typename Config::SkipPolicy policy(problem, work.batch, rows.end > 0 ? rows.head : work.head);
    typename Mainloop::FragmentO acc_o;
    LazySoftmax softmax;
    mainloop.run(work, policy, feed, acc_o, softmax);
    if constexpr (Config::kVoted) {
      if (rows.begin < rows.end && rows.begin > -kWarpgroupRows &&
          threadIdx.x % kWarpgroupThreads == 0) {
        policy.store_counters();
      }
    }
    store_output<Config>(problem, work, mainloop, smem, acc_o, softmax);
    mainloop.release_queries();
    if (threadIdx.x % kWarpThreads == 0) smem.work_empty[position.slot].arrive();
    position.advance();
  }
  mainloop.finish();
}

template <class Config, class BlockIterator>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    attend_kernel(const __grid_constant__ AttendArguments arguments) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);
  if (threadIdx.x == 0) {
    init_barriers<Config>(smem);
    fence_barrier_init();
  }
  __syncthreads();

  if (cutlass::canonical_warp_group_idx() == Config::kWarpgroups) {
    if constexpr (Config::kRedistributes) {
      cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    }
    const int warp = static_cast<int>(threadIdx.x) % kWarpgroupThreads / kWarpThreads;
    if (warp == 0) {
      TileProducer<Config, BlockIterator, Operand::kKeys>(arguments, smem).run();
    } else if (warp == 1) {
      TileProducer<Config, BlockIterator, Operand::kValues>(arguments, smem).run();
    } else if (warp == 2) {
      schedule_work<Config, BlockIterator>(arguments, smem);
    } else {
      check_values<Config>(smem);
    }
  } else {
    if constexpr (Config::kRedistributes) {
      cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    }
    consume<Config>(arguments, smem);
  }
}

// One work item a CTA. The other CTAs of the SM compute while this one waits for its copies.
template <class Config, class BlockIterator>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    attend_self_fed_kernel(const __grid_constant__ AttendArguments arguments) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);
  SelfFeed<Config, BlockIterator> feed(arguments, smem);
  if (threadIdx.x < kWarpThreads) {
    if (threadIdx.x == 0) {
      init_barriers<Config>(smem);
      fence_barrier_init();
    }
    __syncwarp();
    feed.start();
  }
  __syncthreads();

  const Work& work = smem.work[0];
  if (work.tiles < 0) return;
  using Mainloop = AttendMainloop<Config>;
  Mainloop mainloop(arguments, smem);
  typename Config::SkipPolicy policy(arguments.problem, work.batch, work.head);
  typename Mainloop::FragmentO acc_o;
  LazySoftmax softmax;
  mainloop.run(work, policy, feed, acc_o, softmax);
  store_output<Config>(arguments.problem, work, mainloop, smem, acc_o, softmax);
}

}  // namespace attnsieve::sm90
