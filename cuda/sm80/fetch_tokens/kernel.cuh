// Computes        positions and slots of fetch_tokens (attnsieve/fetch.h), and copies the rows of
//                 tokens that were in no slot.
// Roles           place_tokens_kernel: a CTA owns the list of a sequence and head.
//                 copy_tokens_kernel: kCopyParts CTAs share one; a warp copies a token's two rows,
//                 16 bytes a lane, kCopiesInFlight tokens at a time.
// Shared memory   sums of warps
// Invariants      Slots and tokens are numbered in their order: results do not depend on timing.
// Not handled     rows that are not multiples of 16 bytes.
#pragma once

#include "cuda/common/block_scan.cuh"
#include "cuda/sm80/fetch_tokens/arguments.h"

namespace attnsieve::sm80 {

inline constexpr int kPlaceThreads = 512;
inline constexpr int kCopyWarps = 8;
inline constexpr int kCopiesInFlight = 4;

// f(rank, i) for the i in [0, count) that `takes` says, in order. Returns how many.
template <class Takes, class F>
__device__ __forceinline__ int for_ranked(int count, uint32_t* warp_totals, int* total,
                                          Takes&& takes, F&& f) {
  int taken = 0;
  for (int base = 0; base < count; base += kPlaceThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    const bool mine = i < count && takes(i);
    const int rank =
        taken + static_cast<int>(block_exclusive_sum<kPlaceThreads>(mine, warp_totals));
    if (mine) f(rank, i);
    if (threadIdx.x == kPlaceThreads - 1) *total = rank + mine;
    __syncthreads();
    taken = *total;
    __syncthreads();
  }
  return taken;
}

__global__ void __launch_bounds__(kPlaceThreads)
    place_tokens_kernel(const __grid_constant__ FetchArguments a) {
  __shared__ uint32_t warp_totals[32];
  __shared__ int total;
  const FetchProblem& p = a.problem;
  const int64_t line = blockIdx.x;
  const int count = max(min(p.counts[line], p.capacity), 0);
  const int32_t* const list = p.indices + line * p.capacity;
  int32_t* const slots = p.slots + line * p.num_slots;
  int32_t* const positions = p.positions + line * p.capacity;
  int32_t* const free = a.free + line * p.num_slots;
  const int first_new = p.first_new == nullptr ? INT32_MAX : p.first_new[line / p.num_heads];
  for (int i = threadIdx.x; i < p.capacity; i += kPlaceThreads) positions[i] = -1;
  __syncthreads();

  const auto is_free = [&](int slot) {
    const int token = slots[slot];
    if (token >= first_new) slots[slot] = -1;
    const int place = token < 0 || token >= first_new ? -1 : place_in_list(list, count, token);
    if (place >= 0) positions[place] = slot;
    return place < 0;
  };
  const int num_free = for_ranked(p.num_slots, warp_totals, &total, is_free,
                                  [&](int rank, int slot) { free[rank] = slot; });

  const auto is_missing = [&](int i) {
    return positions[i] < 0 && list[i] >= 0 && list[i] < p.num_tokens;
  };
  const int missing = for_ranked(count, warp_totals, &total, is_missing, [&](int rank, int i) {
    if (rank >= num_free) return;  // only where a list or the slots name a token twice
    const int slot = free[rank];
    positions[i] = slot;
    slots[slot] = list[i];
    a.tokens[line * p.capacity + rank] = list[i];
  });
  const int copied = min(missing, num_free);
  if (threadIdx.x != 0) return;
  a.copied[line] = copied;
  if (p.moved == nullptr) return;
  auto* const moved = reinterpret_cast<unsigned long long*>(p.moved);
  atomicAdd(&moved[0], static_cast<unsigned long long>(count));
  atomicAdd(&moved[1], static_cast<unsigned long long>(copied));
}

__device__ __forceinline__ char* row_of(const HeadTensor& rows, int64_t line, int64_t heads,
                                        int64_t row) {
  return static_cast<char*>(rows.data) + line / heads * rows.stride_batch +
         line % heads * rows.stride_head + row * rows.stride_row;
}

__global__ void __launch_bounds__(kCopyWarps* kWarpThreads)
    copy_tokens_kernel(const __grid_constant__ FetchArguments a) {
  const FetchProblem& p = a.problem;
  const int64_t lines = p.batch * p.num_heads;
  const int64_t line = blockIdx.x % lines;
  const int parts = static_cast<int>(gridDim.x / lines);
  const int part = static_cast<int>(blockIdx.x / lines);
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int warp = part * kCopyWarps + static_cast<int>(threadIdx.x) / kWarpThreads;
  const int step = parts * kCopyWarps;
  const int copied = a.copied[line];
  const int32_t* const tokens = a.tokens + line * p.capacity;
  const int32_t* const free = a.free + line * p.num_slots;
  const int pieces = static_cast<int>(p.row_bytes / 16);  // of a row
  for (int first = warp; first < copied; first += step * kCopiesInFlight) {
    for (int piece = lane; piece < 2 * pieces; piece += kWarpThreads) {
      const HeadTensor& from = piece < pieces ? p.k : p.v;
      const HeadTensor& to = piece < pieces ? p.k_slots : p.v_slots;
      const int offset = piece % pieces * 16;
      uint4 data[kCopiesInFlight];
#pragma unroll
      for (int i = 0; i < kCopiesInFlight; ++i) {
        const int rank = first + i * step;
        if (rank >= copied) break;  // nothing crosses the link in vain
        data[i] =
            *reinterpret_cast<const uint4*>(row_of(from, line, p.num_heads, tokens[rank]) + offset);
      }
#pragma unroll
      for (int i = 0; i < kCopiesInFlight; ++i) {
        const int rank = first + i * step;
        if (rank < copied)
          *reinterpret_cast<uint4*>(row_of(to, line, p.num_heads, free[rank]) + offset) = data[i];
      }
    }
  }
}

}  // namespace attnsieve::sm80
