// Computes        Decode (cuda/sm80/decode/kernel.cuh) without the tiles of keys that the scores say
//                 cannot matter: a tile is skipped where for every query vector of the item
//                 m_tile - m_run < ln(lambda) (BLASST, arXiv 2512.12087).
// Roles           A warp is a split: it walks tiles split, split + splits, ... of the item's visiting
//                 order, and decides alone. A CTA has kDecodeWarps neighbouring splits of one item.
// Shared memory   A few stages of 16 rows of K and of V a warp, then the warps' results, then the
//                 weights of all CTAs' results.
// Pipeline        A warp waits for its own copies only. Keys run ahead over votes; values are asked
//                 for after them, so that a skipped tile costs half of its bytes, and are added step
//                 by step under the keys of the next tile. One loop in as little code as possible:
//                 with the steps of a tile unrolled a third of the time went to instruction fetches.
// Invariants      Splits are the caller's, their results are merged in their order: decisions and
//                 bits depend on nothing else.
// Not handled     Lists of tokens; head_dim beyond 128.
#pragma once

#include "cuda/sm80/decode/merge.cuh"
#include "cuda/sm80/threshold_decode/mainloop.cuh"

namespace attnsieve::sm80 {

template <class Config>
struct ThresholdStorage {
  union {
    ThresholdStages<Config> stages[kDecodeWarps];
    typename Config::Merge merges[kDecodeWarps];
    ChunkWeights<Config> weights;
  };
  DecodeTask task;
  float log2_lambda[Config::kColumns];
  bool last;
};

__device__ __forceinline__ float column_threshold(const Threshold& t, const DecodeItem& item,
                                                  int column) {
  if (t.per_head == nullptr) return t.value;
  return t
      .per_head[item.batch * t.stride_batch + (item.head + column % item.heads) * t.stride_head];
}

template <class Types, int kHeadDim, int kColumnTiles>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeCtasPerSm)
    threshold_decode_kernel(const __grid_constant__ DecodeArguments a) {
  using Config = DecodeConfig<Types, kHeadDim, kColumnTiles>;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<ThresholdStorage<Config>*>(shared_memory);
  const int parts = a.plan.max_chunks;  // CTAs of an item
  const int item = static_cast<int>(blockIdx.x) / parts;
  const int part = static_cast<int>(blockIdx.x) % parts;
  const int warp_index = static_cast<int>(threadIdx.x) / kWarpThreads;
  if (threadIdx.x == 0) smem.task = make_task<typename Config::Stored>(a, item);
  __syncthreads();
  const DecodeTask& task = smem.task;
  if (static_cast<int>(threadIdx.x) < task.item.columns) {
    smem.log2_lambda[threadIdx.x] =
        log2f(column_threshold(a.problem.threshold, task.item, static_cast<int>(threadIdx.x)));
  }
  __syncthreads();
  {
    WarpResult<Config> result;
    ThresholdWarp<Config> warp(a, task, smem.log2_lambda, smem.stages[warp_index]);
    const int splits = a.problem.num_splits;
    const int split = part * kDecodeWarps + warp_index;
    if (split < splits) {
      warp.run(split, splits, result);
      warp.store_counters(split, splits);
    }
    __syncthreads();
    publish(result, smem.merges[warp_index]);
  }
  __syncthreads();
  const int64_t first_slot = static_cast<int64_t>(item) * parts;
  merge_warps<Config>(a, task.item, parts == 1, first_slot + part, smem.merges);
  if (parts == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    smem.last = atomicAdd(a.arrivals + item, 1u) + 1 == static_cast<unsigned>(parts);
    __threadfence();
  }
  __syncthreads();
  if (smem.last) {
    merge_chunks<Config>(a, task.item, first_slot, parts, /*all_exist=*/true, smem.weights);
  }
}

}  // namespace attnsieve::sm80
