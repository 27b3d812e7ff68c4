// Computes        as kernel.cuh, for rules that keep a number of blocks.
// Roles           A warp owns one row, whose scores lie in registers as integers of their order: a
//                 forced block above all, no block below all. The smallest kept one is found by
//                 bisection; of those equal to it the first are kept.
// Shared memory   none
// Invariants      The count of blocks at or above the lower bound is never below the budget.
// Not handled     More than kRankedColumns blocks a row, masses.
#pragma once

#include "cuda/common/score_order.cuh"
#include "cuda/sm80/select/row.cuh"

namespace attnsieve::sm80 {

inline constexpr int kRankedWarps = 4;
inline constexpr int kRankedColumns = 2048;
inline constexpr uint32_t kForced = 0xffffffffu;  // no score comes near

// Blocks whose rank is at least `bound`.
template <int kSteps>
__device__ __forceinline__ int count_from(const uint32_t (&ranks)[kSteps], uint32_t bound) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) count += ranks[i] >= bound;
  return __reduce_add_sync(0xffffffffu, count);
}

// A row of at most 32 kSteps visible blocks: block begin + 32 i + lane is the lane's i-th.
template <int kSteps>
__device__ void select_ranked(const SelectProblem& p, const SelectRow& row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  uint32_t ranks[kSteps];
  uint32_t low = kForced;  // of blocks that are not forced
  uint32_t high = 0;
  int forced = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {  // all loads before the first is needed
    const int column = row.begin() + i * kWarpThreads + lane;
    ranks[i] = column < row.end() ? __float_as_uint(row.score(column)) : 0;
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int column = row.begin() + i * kWarpThreads + lane;
    const bool exists = column < row.end();
    const bool is_forced = exists && row.is_forced(column);
    const uint32_t rank = score_order(__uint_as_float(ranks[i])) + 1;
    low = min(low, exists && !is_forced ? rank : kForced);
    high = max(high, exists && !is_forced ? rank : 0);
    forced += is_forced;
    ranks[i] = is_forced ? kForced : exists ? rank : 0;
  }
  forced = __reduce_add_sync(0xffffffffu, forced);
  const int budget = row.budget(p, forced);

  uint32_t bound = kForced;
  int count = forced;
  if (budget > forced) {
    low = __reduce_min_sync(0xffffffffu, low);
    high = __reduce_max_sync(0xffffffffu, high);
    count = row.end() - row.begin();
    while (count != budget && low < high) {
      const uint32_t middle = high - (high - low) / 2;
      const int found = count_from(ranks, middle);
      if (found >= budget) {
        low = middle;
        count = found;
      } else {
        high = middle - 1;
      }
    }
    bound = low;
  }
  // `count` blocks are at the bound or above: of those at it the last are too many.
  const int equal =
      count > budget ? budget - count_from(ranks, bound + 1) : count;  // that are kept

  // A bit for each block of the lane; in bits a loop over blocks need not be unrolled.
  constexpr int kWords = (kSteps + 31) / 32;
  uint32_t above[kWords] = {};
  uint32_t tied[kWords] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    above[i / 32] |= ranks[i] > bound ? 1u << i % 32 : 0u;
    tied[i / 32] |= ranks[i] == bound ? 1u << i % 32 : 0u;
  }
  const uint32_t before = (1u << lane) - 1;
  int written = 0;
  int seen = 0;
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    const int first = row.begin() + word * 32 * kWarpThreads;
#pragma unroll 1
    for (int i = 0; i < min(kSteps, 32) && first + i * kWarpThreads < row.end(); ++i) {
      const uint32_t ties = __ballot_sync(0xffffffffu, tied[word] >> i & 1);
      const bool first_ties = seen + __popc(ties & before) < equal;
      const bool keep = (above[word] >> i & 1) != 0 || ((tied[word] >> i & 1) != 0 && first_ties);
      seen += __popc(ties);
      const uint32_t kept = __ballot_sync(0xffffffffu, keep);
      if (keep) row.put(written + __popc(kept & before), first + i * kWarpThreads + lane);
      written += __popc(kept);
    }
  }
  row.finish(written, lane, kWarpThreads);
}

__global__ void __launch_bounds__(kRankedWarps* kWarpThreads)
    select_ranked_kernel(const __grid_constant__ SelectProblem p) {
  const int64_t flat =
      int64_t{blockIdx.x} * kRankedWarps + static_cast<int>(threadIdx.x) / kWarpThreads;
  if (flat >= p.batch * p.num_heads * num_q_blocks(p)) return;
  const SelectRow row(p, flat);
  const int steps = (row.end() - row.begin() + kWarpThreads - 1) / kWarpThreads;
  if (steps <= 8) return select_ranked<8>(p, row);
  if (steps <= 16) return select_ranked<16>(p, row);
  if (steps <= 32) return select_ranked<32>(p, row);
  select_ranked<kRankedColumns / kWarpThreads>(p, row);
}

}  // namespace attnsieve::sm80
