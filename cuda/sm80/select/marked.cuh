// Computes        counts[b, h, r], columns[b, h, r, :]: the visible KV blocks of row r whose bit is
//                 set or that are forced, ascending.
// Roles           A warp owns one row; a lane takes 32 blocks, a word of bits, at a time.
// Shared memory   none
// Invariants      What a row keeps is known from its bits alone; nothing is ranked.
#pragma once

#include "cuda/sm80/select/row.cuh"

namespace attnsieve::sm80 {

inline constexpr int kMarkedWarps = 4;

// Bits [begin, end) of the word whose first bit is number `first`.
__device__ __forceinline__ uint32_t range_bits(int64_t begin, int64_t end, int64_t first) {
  const int64_t low = min64(max64(begin - first, 0), 32);
  const int64_t high = min64(max64(end - first, 0), 32);
  if (low >= high) return 0;
  return static_cast<uint32_t>((uint64_t{1} << high) - (uint64_t{1} << low));
}

__global__ void __launch_bounds__(kMarkedWarps* kWarpThreads)
    select_marked_kernel(const __grid_constant__ SelectProblem p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int64_t num_q_blocks = (p.seqlen_q + p.block_q - 1) / p.block_q;
  const int64_t flat =
      int64_t{blockIdx.x} * kMarkedWarps + static_cast<int>(threadIdx.x) / kWarpThreads;
  if (flat >= p.batch * p.num_heads * num_q_blocks) return;
  const int64_t row = flat % num_q_blocks;
  const Seqlens lengths = seqlens_of(p, flat / num_q_blocks / p.num_heads);
  const int64_t row_end = min64((row + 1) * p.block_q, lengths.q);
  const KeyRange keys = visible_keys(p.mask, row * p.block_q, row_end, lengths.q, lengths.k);
  KeyRange visible = {0, 0};
  if (keys.begin < keys.end)
    visible = {keys.begin / p.block_k, (keys.end + p.block_k - 1) / p.block_k};
  const KeyRange diagonal = diagonal_blocks(row, p.block_q, p.block_k, lengths.q, lengths.k);
  KeyRange local = {0, 0};
  if (diagonal.begin < diagonal.end) {
    local = {diagonal.begin - p.local_blocks, p.force_diagonal ? diagonal.end : diagonal.begin};
  }
  const int64_t num_k_blocks = (p.seqlen_k + p.block_k - 1) / p.block_k;
  const int64_t words = (num_k_blocks + 31) / 32;
  const uint32_t* const marks = p.marks + flat * words;
  int32_t* const columns = p.columns + flat * p.capacity;

  const auto kept_of = [&](int64_t word) {
    if (word >= words) return uint32_t{0};
    const int64_t first = word * 32;
    const uint32_t kept = marks[word] | range_bits(0, p.sink_blocks, first) |
                          range_bits(local.begin, local.end, first);
    return kept & range_bits(visible.begin, visible.end, first);
  };

  int total = 0;
  for (int64_t word = lane; word < words; word += kWarpThreads) total += __popc(kept_of(word));
  total = __reduce_add_sync(0xffffffffu, total);
  const int sinks = static_cast<int>(
      min64(max64(min64(visible.end, p.sink_blocks) - visible.begin, 0), p.capacity));
  const int surplus = max(total - p.capacity, 0);  // positions from `sinks` on that are left out

  int seen = 0;
  for (int64_t base = 0; base < words; base += kWarpThreads) {
    const int64_t word = base + lane;
    uint32_t kept = kept_of(word);
    const int count = __popc(kept);
    int through = count;
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, through, distance);
      if (lane >= distance) through += before;
    }
    int position = seen + through - count;
    for (; kept != 0; kept &= kept - 1, ++position) {
      if (position >= sinks && position < sinks + surplus) continue;
      const int slot = position < sinks ? position : position - surplus;
      columns[slot] = static_cast<int32_t>(word * 32) + __ffs(kept) - 1;
    }
    seen += __shfl_sync(0xffffffffu, through, kWarpThreads - 1);
  }
  const int written = total - surplus;
  fill_list(columns, written, p.capacity, lane, kWarpThreads);
  if (lane == 0) p.counts[flat] = written;
}

}  // namespace attnsieve::sm80
