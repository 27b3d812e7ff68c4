// Computes        max_u x[b, i, h, u] and sum_u exp(x - max) over the candidates, for a softmax of
//                 proxy scores: of every chunk of units, then of all of them.
// Roles           A warp owns an item of the first kernel, a row and head of the second.
// Shared memory   A tile as in kernel.cuh, and the lanes' totals of each head (6.3 KB a warp).
// Invariants      Chunks lie by position and are added in one order: the same bits whatever else is
//                 in the batch.
#pragma once

#include "cuda/sm80/proxy_scores/kernel.cuh"

namespace attnsieve::sm80 {

__device__ __forceinline__ void add_total(SoftmaxTotal& total, const SoftmaxTotal& other) {
  const float max = max_nan(total.max, other.max);
  if (max == negative_infinity()) return;  // both are empty
  const float own = total.max == negative_infinity() ? 0.0f : total.sum * expf(total.max - max);
  const float others = other.max == negative_infinity() ? 0.0f : other.sum * expf(other.max - max);
  total = {max, own + others};
}

__device__ __forceinline__ SoftmaxTotal total_of_warp(SoftmaxTotal total) {
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    add_total(total, {__shfl_xor_sync(kAllLanes, total.max, distance),
                      __shfl_xor_sync(kAllLanes, total.sum, distance)});
  }
  return total;
}

struct TotalsTile {
  ScoreTile scores;
  SoftmaxTotal totals[kScoreTileVectors][kWarpThreads];
};

template <class Element>
__global__ void __launch_bounds__(kScoreThreads, kScoreCtasPerSm)
    softmax_chunks_kernel(const __grid_constant__ ProxyScoresArguments a) {
  __shared__ TotalsTile tiles[kScoreWarps];
  const ProxyScoresProblem& p = a.problem;
  const ProxyScoresPlan& plan = a.plan;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kScoreWarps + warp;
  if (item >= plan.total_items) return;
  TotalsTile& tile = tiles[warp];
  const int chunk = static_cast<int>(item) % plan.chunks;
  int rest = static_cast<int>(item) / plan.chunks;
  const int per_key = (plan.heads_per_key + plan.total_heads - 1) / plan.total_heads;
  const int blocks = static_cast<int>(p.num_key_heads) * per_key;
  const int block = rest % blocks;
  rest /= blocks;
  const int row = rest % plan.out_rows;
  const int batch = rest / plan.out_rows;
  const int in_key = block % per_key * plan.total_heads;
  const int first_head = block / per_key * plan.heads_per_key + in_key;
  const QueryVectors vectors{row, 1, first_head, min(plan.total_heads, plan.heads_per_key - in_key),
                             plan.merged_rows};

  const int lane = lane_index();
  for (int i = 0; i < vectors.heads; ++i) tile.totals[i][lane] = {negative_infinity(), 0.0f};
  const ScoredUnits units(p, batch);
  UnitScores<Element> scores(a, batch, tile.scores);
  for (int turn = 0; turn < kSoftmaxChunkUnits / kScoreTileUnits; ++turn) {
    const int64_t unit =
        static_cast<int64_t>(chunk) * kSoftmaxChunkUnits + turn * kScoreTileUnits + lane;
    UnitPlace place{-1, 0};
    if (unit < p.units) place = units.place_of(static_cast<int>(unit));
    const bool exists = place.outer >= 0;
    if (!__any_sync(kAllLanes, exists)) continue;
    scores.set_unit(place, exists ? units.first_row(static_cast<int>(unit)) : 0);
    scores.for_each_head(vectors, [&](int, int head, float score, bool sees) {
      if (sees) add_total(tile.totals[head - first_head][lane], {score, 1.0f});
    });
  }
  for (int i = 0; i < vectors.heads; ++i) {
    const SoftmaxTotal total = total_of_warp(tile.totals[i][lane]);
    const int64_t line =
        (static_cast<int64_t>(batch) * plan.out_rows + row) * p.num_heads + first_head + i;
    if (lane == 0) a.chunk_totals[line * plan.chunks + chunk] = total;
  }
}

// A template only so that it may stand in a header.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    softmax_totals_kernel(const __grid_constant__ ProxyScoresArguments a) {
  const int64_t line =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpThreads) + threadIdx.x / kWarpThreads;
  if (line >= a.problem.batch * a.plan.out_rows * a.problem.num_heads) return;
  SoftmaxTotal total{negative_infinity(), 0.0f};
  for (int chunk = lane_index(); chunk < a.plan.chunks; chunk += kWarpThreads) {
    add_total(total, a.chunk_totals[line * a.plan.chunks + chunk]);
  }
  total = total_of_warp(total);
  if (lane_index() == 0) a.totals[line] = {total.max, 1.0f / total.sum};
}

}  // namespace attnsieve::sm80
