// Computes        As cuda/sm80/decode/kernel.cuh, for lists: in one launch and without a workspace.
// Roles           A cluster of plan.ranks CTAs owns an item. Its slots are cut into kDecodeRuns runs of
//                 equal length, one or two a rank; every rank merges the results of all for its share
//                 of the output.
// Shared memory   As kernel.cuh, but the warps' results lie where their tiles were; and the CTA's
//                 result, which the other ranks read.
// Pipeline        As kernel.cuh; a cluster barrier before the results are read, and one before the
//                 end: no rank leaves while another may read its memory.
// Invariants      Runs depend on the item's own slots, and results are merged in their order: the same
//                 bits whatever else is in the batch, and whatever the size of the cluster.
// Not handled     What few items do not fill the GPU with: everything of a long cache.
#pragma once

#include <cooperative_groups.h>

#include "cuda/sm80/decode/merge.cuh"

namespace attnsieve::sm90 {

namespace cg = cooperative_groups;
using sm80::DecodeArguments;
using sm80::DecodeItem;
using sm80::DecodeTask;

// Runs of slots that an item is cut into, whatever the size of the cluster.
inline constexpr int kDecodeRuns = 8;
inline constexpr int kMostRunsOfRank = 2;

template <class Config>
struct ClusterDecodeStorage {
  union {
    typename Config::Stages stages[sm80::kDecodeWarps];
    typename Config::Merge merges[sm80::kDecodeWarps];
  };
  sm80::PartResult<Config> parts[kMostRunsOfRank];  // of this CTA's runs
  DecodeTask task;
};

__device__ __forceinline__ int decode_rank(const DecodeArguments& a) {
  return static_cast<int>(blockIdx.x) % a.plan.ranks;
}

// This rank's share of the quads of dimensions of all columns, eight lanes a quad: each brings one
// run's part.
template <class Config>
__device__ void merge_ranks(const DecodeArguments& a, const DecodeItem& item,
                            ClusterDecodeStorage<Config>& smem) {
  constexpr int kQuads = Config::kQuads;
  constexpr int kQuadsAtOnce = sm80::kDecodeThreads / kDecodeRuns;
  const float scale_log2 = sm80::logit_scale(a.problem, item.kv_head) * kLog2e;
  const int ranks = a.plan.ranks;
  const int runs = kDecodeRuns / ranks;
  const int source_run = static_cast<int>(threadIdx.x) % kDecodeRuns;
  const sm80::PartResult<Config>& source =
      *cg::this_cluster().map_shared_rank(&smem.parts[source_run % runs], source_run / runs);
  const int quads = item.columns * kQuads;
  for (int base = decode_rank(a) * kQuadsAtOnce; base < quads; base += ranks * kQuadsAtOnce) {
    const int quad = base + static_cast<int>(threadIdx.x) / kDecodeRuns;
    const bool exists = quad < quads;
    const int column = exists ? quad / kQuads : 0;
    const int dim = quad % kQuads * 4;
    const float part_max = source.max[column];
    float max = part_max;
#pragma unroll
    for (int distance = 1; distance < kDecodeRuns; distance *= 2) {
      max = max_nan(max, __shfl_xor_sync(0xffffffffu, max, distance));
    }
    const float weight = sm80::part_weight(part_max, max, scale_log2);
    const float4 part = *reinterpret_cast<const float4*>(source.out[column] + dim);
    float sum = weight * source.sum[column];
    float4 value = make_float4(weight * part.x, weight * part.y, weight * part.z, weight * part.w);
#pragma unroll
    for (int distance = 1; distance < kDecodeRuns; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      value.x += __shfl_xor_sync(0xffffffffu, value.x, distance);
      value.y += __shfl_xor_sync(0xffffffffu, value.y, distance);
      value.z += __shfl_xor_sync(0xffffffffu, value.z, distance);
      value.w += __shfl_xor_sync(0xffffffffu, value.w, distance);
    }
    if (exists && source_run == 0) {
      sm80::store_column<typename Config::Element>(a.problem, item, column, dim, value, max, sum);
    }
  }
}

template <class Types, int kHeadDim, int kColumnTiles>
__global__ void __launch_bounds__(sm80::kDecodeThreads,
                                  sm80::DecodeConfig<Types, kHeadDim, kColumnTiles>::kCtasPerSm)
    decode_list_kernel(const __grid_constant__ DecodeArguments a) {
  using Config = sm80::DecodeConfig<Types, kHeadDim, kColumnTiles>;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<ClusterDecodeStorage<Config>*>(shared_memory);
  if (threadIdx.x == 0) {
    const int item = static_cast<int>(blockIdx.x) / a.plan.ranks;
    smem.task = sm80::make_task<typename Config::Stored>(a, item);
  }
  __syncthreads();
  const DecodeTask& task = smem.task;
  constexpr int kRunUnit = sm80::kDecodeWarps * sm80::kTileKeys;
  const int units = (task.slots + kRunUnit - 1) / kRunUnit;
  const int run_slots = (units + kDecodeRuns - 1) / kDecodeRuns * kRunUnit;
  const int runs = kDecodeRuns / a.plan.ranks;
  const int warp_index = static_cast<int>(threadIdx.x) / kWarpThreads;
  sm80::DecodeWarp<Config> warp(a, smem.stages[warp_index]);
#pragma unroll 1
  for (int run = 0; run < runs; ++run) {
    const int begin = (decode_rank(a) * runs + run) * run_slots;
    warp.start(task, begin, min(task.slots, begin + run_slots));
    {
      sm80::WarpResult<Config> result;
      warp.run(result);
      __syncthreads();
      publish(result, smem.merges[warp_index]);
    }
    __syncthreads();
    sm80::merge_warps<Config>(a, task.item, smem.merges, smem.parts[run]);
    __syncthreads();
  }
  cg::this_cluster().sync();
  merge_ranks<Config>(a, task.item, smem);
  cg::this_cluster().sync();
}

}  // namespace attnsieve::sm90
