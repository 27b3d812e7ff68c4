// Computes        as cuda/sm80/estimate/kernel.cuh.
// Roles           A CTA takes kWarps sets of 64 sampled rows that share a KV head, a warp each, and
//                 walks over the keys that they see. A warpgroup brings keys and their scales: one
//                 thread by bulk copies and a warp, or all, which widen codes of 4 bits. Two
//                 warpgroups score: fragment t of a warpgroup's four warps is the M-tile t of its
//                 MMAs.
// Shared memory   a ring of stages of kStageKeys keys; maxima of a stage, of each warp its own.
// Pipeline        full (33 arrivals and the bytes; widened: 128 arrivals), empty (an arrival of each
//                 warpgroup). Within a stage the next product is issued before the last one is
//                 reduced; a stage ends with nothing in flight, or ptxas would serialise the MMAs of
//                 all.
// Invariants      those of sm_80, whose numbers these are.
// Not handled     q-blocks of more than 64 sampled rows, sums; head_dim other than 64, 96, 128.
#pragma once

#include "cuda/sm90/estimate/keys.cuh"
#include "cuda/sm90/estimate/warp.cuh"

namespace attnsieve::sm90 {

// A stage whose keys all rows see: the next product runs under the maxima of the last one.
template <class Config>
__device__ __forceinline__ void score(EstimateWarp<Config>& rows, int slot) {
  constexpr int kProducts = Config::kStageTiles * Config::kFragments;
  const int first_tile = slot * Config::kStageTiles;
  typename EstimateWarp<Config>::Products products[2];
  rows.issue(products[0], 0, first_tile);
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    if (i + 1 < kProducts) {
      rows.issue(products[(i + 1) % 2], (i + 1) % Config::kFragments,
                 first_tile + (i + 1) / Config::kFragments);
      warpgroup_wait<1>();
    } else {
      warpgroup_wait<0>();
    }
    warpgroup_fence_operand(products[i % 2]);
    const int tile = i / Config::kFragments;
    rows.template reduce<false>(products[i % 2], i % Config::kFragments, tile, slot);
  }
}

// Any stage: one product at a time, of tiles that some row sees.
template <class Config>
__device__ __forceinline__ void score_masked(EstimateWarp<Config>& rows, const EstimateWalk& walk,
                                             int first, int slot) {
#pragma unroll 1
  for (int tile = 0; tile < Config::kStageTiles; ++tile) {
    const int key = first + tile * Config::kTileKeys;
    if (key >= walk.end_key || key + Config::kTileKeys <= walk.begin_key) {
      rows.skip(tile);
      continue;
    }
#pragma unroll
    for (int fragment = 0; fragment < Config::kFragments; ++fragment) {
      typename EstimateWarp<Config>::Products products;
      rows.issue(products, fragment, slot * Config::kStageTiles + tile);
      warpgroup_wait<0>();
      warpgroup_fence_operand(products);
      rows.hide(products, fragment, key);
      rows.template reduce<true>(products, fragment, tile, slot);
    }
  }
}

// Of the row sets [first, end) of a head.
template <class Config>
__device__ EstimateWalk walk_of(const EstimateProblem& p, const EstimateSequence& sequence,
                                int64_t first, int64_t end) {
  const int64_t set_rows = int64_t{Config::kBlocks} * p.block_q;
  const int64_t row_begin = first * set_rows;
  const int64_t row_end = end * set_rows;
  EstimateWalk walk = {};
  const KeyRange keys = estimated_keys(p, sequence, row_begin, row_end);
  if (keys.begin >= keys.end) return walk;
  walk.begin_key = static_cast<int>(keys.begin);
  walk.end_key = static_cast<int>(keys.end);
  walk.begin = static_cast<int>(keys.begin / Config::kStageKeys);
  walk.end = static_cast<int>((keys.end + Config::kStageKeys - 1) / Config::kStageKeys);
  const KeyRange last = estimated_keys(p, sequence, row_end - 1, row_end);
  if (last.begin >= last.end) return walk;  // or the row does not exist
  walk.all_begin = static_cast<int>(last.begin);
  walk.all_end = static_cast<int>(estimated_keys(p, sequence, row_begin, row_begin + 1).end);
  return walk;
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    estimate_block_scores_kernel(const __grid_constant__ EstimateArguments a) {
  extern __shared__ __align__(1024) unsigned char storage[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(storage);
  const EstimateProblem& p = a.problem;
  // Sets of the last rows first. A set of a head: (row set, head of the group).
  const int kv_heads = static_cast<int>(p.num_kv_heads);
  const int group = static_cast<int>(p.num_heads) / kv_heads;
  const int kv_lines = static_cast<int>(p.batch) * kv_heads;
  const int cta = static_cast<int>(blockIdx.x);
  const int first_set = (a.cta_sets - 1 - cta / kv_lines) * Config::kWarps;
  const int batch = cta % kv_lines / kv_heads;
  const int kv_head = cta % kv_lines % kv_heads;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      smem.full[i].init(p.k.bits == 8 ? 1 + kWarpThreads : 128);
      smem.empty[i].init(Config::kWarpgroups);
    }
    fence_barrier_init();
    smem.sequence = sequence_of(p, batch);
    smem.walk = walk_of<Config>(p, smem.sequence, first_set / group,
                                (first_set + Config::kWarps - 1) / group + 1);
  }
  __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;

  if (warpgroup == Config::kWarpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kCopyRegisters>();
    if (p.k.bits == 4) {
      widen_keys<Config>(a, smem, kv_head);
    } else if (threadIdx.x % 128 == 0) {
      copy_keys<Config>(a, smem, kv_head, batch);
    } else if (threadIdx.x % 128 / kWarpThreads == 1) {
      copy_scales<Config>(a, smem, kv_head);
    }
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<Config::kScoreRegisters>();
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int set = first_set + warp;
  EstimateWarp<Config> rows(a, smem, warp);
  rows.load_rows(batch, kv_head * group + set % group, set / group);
  const int stages = static_cast<int>((p.num_keys() + Config::kStageKeys - 1) / Config::kStageKeys);
  for (int stage = 0; stage < smem.walk.begin; ++stage) rows.store(stage, false);
#pragma unroll 1
  for (int stage = smem.walk.begin; stage < smem.walk.end; ++stage) {
    const int first = stage * Config::kStageKeys;
    const int n = __shfl_sync(0xffffffffu, stage - smem.walk.begin, 0);  // uniform, and known to be
    const int slot = slot_of<Config>(n);
    smem.full[slot].wait(phase_of<Config>(n));
    if (first < smem.walk.all_begin || first + Config::kStageKeys > smem.walk.all_end) {
      score_masked<Config>(rows, smem.walk, first, slot);
    } else {
      score<Config>(rows, slot);
    }
    if (threadIdx.x % 128 == 0) smem.empty[slot_of<Config>(stage - smem.walk.begin)].arrive();
    rows.store(stage, true);
  }
  for (int stage = smem.walk.end; stage < stages; ++stage) rows.store(stage, false);
}

}  // namespace attnsieve::sm90
