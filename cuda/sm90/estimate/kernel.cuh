// Computes        as cuda/sm80/estimate/kernel.cuh.
// Roles           A CTA takes kWarps sets of 64 sampled rows that share a KV head, a warp each, and
//                 walks over the keys that they see. A warpgroup brings keys and their scales: one
//                 thread by bulk copies and a warp, or all, which widen codes of 4 bits. Three
//                 warpgroups score: fragment t of a warpgroup's four warps is the M-tile t of its
//                 MMAs.
// Shared memory   a ring of stages of kStageKeys keys; maxima of kStoreStages stages, of each warp
//                 its own, written to global memory together.
// Pipeline        full (33 arrivals and the bytes; widened: 128 arrivals), empty (an arrival of each
//                 warpgroup). A warpgroup waits for each of its products; those of the others keep
//                 the tensor cores busy meanwhile.
// Invariants      those of sm_80, whose numbers these are.
// Not handled     q-blocks of more than 64 sampled rows, sums; head_dim other than 64, 96, 128.
#pragma once

#include "cuda/sm90/estimate/keys.cuh"
#include "cuda/sm90/estimate/warp.cuh"

namespace attnsieve::sm90 {

// A stage whose keys all rows see. `unit`: its first of those stored together.
template <bool kBits, class Config>
__device__ __forceinline__ void score(EstimateWarp<Config>& rows, int slot, int unit) {
  typename EstimateWarp<Config>::Products products;
#pragma unroll
  for (int i = 0; i < Config::kStageTiles * Config::kFragments; ++i) {
    const int tile = i / Config::kFragments;
    const int fragment = i % Config::kFragments;
    rows.issue(products, fragment, slot * Config::kStageTiles + tile);
    if (fragment == 0) rows.load_scales(tile, slot);
    rows.load_numbers(fragment);
    warpgroup_wait<0>();
    warpgroup_fence_operand(products);
    rows.template reduce<false, kBits>(products, fragment, unit, tile);
  }
}

// Any stage: tiles that some of the warpgroup's rows see.
template <bool kBits, class Config>
__device__ __forceinline__ void score_masked(EstimateWarp<Config>& rows, const EstimateWalk& own,
                                             int slot, int first_key, int unit) {
#pragma unroll 1
  for (int tile = 0; tile < Config::kStageTiles; ++tile) {
    const int key = __shfl_sync(0xffffffffu, first_key + tile * Config::kTileKeys, 0);
    if (key >= own.end_key || key + Config::kTileKeys <= own.begin_key) {
      rows.template skip<kBits>(unit, tile);
      continue;
    }
    rows.load_scales(tile, slot);
#pragma unroll
    for (int fragment = 0; fragment < Config::kFragments; ++fragment) {
      typename EstimateWarp<Config>::Products products;
      rows.load_numbers(fragment);
      rows.issue(products, fragment, slot * Config::kStageTiles + tile);
      warpgroup_wait<0>();
      warpgroup_fence_operand(products);
      rows.hide(products, fragment, key);
      rows.template reduce<true, kBits>(products, fragment, unit, tile);
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

// The keys that a warpgroup's rows see. kBits: of each unit only whether it has a place among the
// results, not its maximum.
template <bool kBits, class Config>
__device__ __forceinline__ void score_stages(EstimateWarp<Config>& rows,
                                             typename Config::SharedStorage& smem, int warpgroup) {
#pragma unroll 1
  for (int stage = smem.walk.begin; stage < smem.walk.end; ++stage) {
    const int first = stage * Config::kStageKeys;
    const int n = __shfl_sync(0xffffffffu, stage - smem.walk.begin, 0);  // uniform, and known to be
    const int slot = slot_of<Config>(n);
    smem.full[slot].wait(phase_of<Config>(n));
    const EstimateWalk& own = smem.own[warpgroup];
    const int unit = stage % Config::kStoreStages * Config::kStageUnits;
    if (first >= own.all_begin && first + Config::kStageKeys <= own.all_end) {
      score<kBits>(rows, slot, unit);
    } else {
      score_masked<kBits>(rows, own, slot, first, unit);
    }
    if (threadIdx.x % 128 == 0) smem.empty[slot].arrive();
    const int next = stage + 1;
    if (next % Config::kStoreStages == 0 || next == smem.walk.end) {
      rows.template store<kBits>(max(smem.walk.begin, stage & -Config::kStoreStages), next);
    }
  }
  rows.template finish<kBits>(smem.walk.begin, smem.walk.end);
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
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (threadIdx.x % 128 == 0) {
    const EstimateSequence sequence = sequence_of(p, batch);
    if (warpgroup == Config::kWarpgroups) {
      for (int i = 0; i < Config::kStages; ++i) {
        smem.full[i].init(p.k.bits == 8 ? 1 + kWarpThreads : 128);
        smem.empty[i].init(Config::kWarpgroups);
      }
      fence_barrier_init();
      smem.sequence = sequence;
      smem.walk = walk_of<Config>(p, sequence, first_set / group,
                                  (first_set + Config::kWarps - 1) / group + 1);
    } else {
      const int own_set = first_set + warpgroup * 4;
      smem.own[warpgroup] =
          walk_of<Config>(p, sequence, own_set / group, (own_set + 3) / group + 1);
    }
  }
  __syncthreads();

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
  const int head = kv_head * group + set % group;
  rows.place(batch, head, set / group);
  rows.load_rows(head);
  if (p.bits != nullptr) {
    score_stages<true>(rows, smem, warpgroup);
  } else {
    score_stages<false>(rows, smem, warpgroup);
  }
}

}  // namespace attnsieve::sm90
