// Sums over the threads of a CTA.
#pragma once

#include "cuda/common/numeric.cuh"

namespace attnsieve {

// Sum of `value` over the threads before this one. One barrier inside; another must lie between two
// calls that share `warp_totals`, which holds a word for each of 32 warps.
template <int kThreads>
__device__ __forceinline__ uint32_t block_exclusive_sum(uint32_t value, uint32_t* warp_totals) {
  constexpr int kWarps = kThreads / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const auto inclusive = [lane](uint32_t x) {
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffffu, x, distance);
      if (lane >= distance) x += before;
    }
    return x;
  };
  const uint32_t in_warp = inclusive(value);
  if (lane == kWarpThreads - 1) warp_totals[warp] = in_warp;
  __syncthreads();
  const uint32_t warps = inclusive(lane < kWarps ? warp_totals[lane] : 0u);
  const uint32_t before = __shfl_sync(0xffffffffu, warps, warp == 0 ? 0 : warp - 1);
  return in_warp - value + (warp == 0 ? 0u : before);
}

}  // namespace attnsieve
