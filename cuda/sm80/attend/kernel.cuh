// Computes        out[b, h, i] = sum_j softmax_j(scale * q[b, h, i] . k[b, h / G, j]) v[b, h / G, j]
//                 over the keys j that the BlockIterator yields and the mask shows;
//                 lse[b, h, i] = ln sum_j exp(scale * q . k), the sink logit included.
// Roles           A CTA owns a group of 64 query rows of one head of one sequence. Every warp does
//                 the same work on its own rows: 2 warps x 32, or 4 warps x 16 where tiles are
//                 voted on (and, for hd128, where a list's pieces are walked).
// Steps           64 keys (hd64 dense: 128) that lie behind each other, or, for lists of small
//                 blocks and for paged K/V, four pieces of 16 keys from anywhere; a step that is
//                 not full ends in zeros, which are masked.
// Shared memory   (KB)                     hd64 dense   hd64 other  hd128
//                 Q / output                    8            8         16
//                 K, V each, not voted         16            8         16
//                 K, V each, voted             16           16         32
// Pipeline        cp.async groups, one barrier per arrival.
//                 Not voted: V(j) starts before S(j), K(j + 1) before softmax(j).
//                 Voted: K of the whole tile; V once the tile is kept; the next K behind it.
// Invariants      row_max is -inf iff the row saw no finite logit. Steps advance in the visiting
//                 order whether or not tiles are voted on, with the same kTileN for an iterator,
//                 so threshold 0 is bitwise equal to no threshold.
// Not handled     Backward, head_dim other than 64 and 128.
#pragma once

#include "cuda/sm80/attend/epilogue.cuh"

namespace attnsieve::sm80 {

template <class Config, class BlockIterator, class SkipPolicy>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attend_kernel(const __grid_constant__ AttendProblem problem) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(shared_memory);

  {
    const WorkTile located = locate_work(problem, blockIdx.x);
    if (!located.valid) return;
    if (threadIdx.x == 0) smem.tile = located;
    __syncthreads();
  }
  const WorkTile& tile = smem.tile;
  BlockIterator iterator(problem, tile, &smem.iterator_scratch);
  SkipPolicy policy(problem, tile.batch, tile.head);

  using Mainloop = AttendMainloop<Config, BlockIterator, SkipPolicy>;
  Mainloop mainloop(problem, tile, smem);
  typename Mainloop::FragmentO acc_o;
  OnlineSoftmax<Mainloop::kRows> softmax;
  mainloop.run(iterator, policy, acc_o, softmax);
  if constexpr (SkipPolicy::kVotes) {
    if (threadIdx.x == 0) policy.store_counters();
  }
  store_output<Config>(problem, tile, mainloop, smem, acc_o, softmax);
}

}  // namespace attnsieve::sm80
