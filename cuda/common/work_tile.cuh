// From a linear CTA number to the group of query rows it owns: (sequence, head, first row), with
// the sequence's lengths and offsets read on device for varlen problems.
#pragma once

#include "attnsieve/problem.h"
#include "attnsieve/visibility.h"
#include "cuda/common/numeric.cuh"

namespace attnsieve {

// Positions within one sequence fit 32 bits (checked on the host); element offsets are 64-bit where
// they are formed.
struct WorkTile {
  bool valid;
  int batch;
  int head;
  int kv_head;
  int row_begin;         // within the sequence
  int row_end;           // row_begin + up to kGroupRows
  int seqlen_q;
  int seqlen_k;
  int token_q;           // first token of the sequence in a varlen tensor, 0 when batched
  int token_k;
  // Query row r sees the keys [max(0, r + begin_shift), min(seqlen_k, r + end_shift)).
  int begin_shift;
  int end_shift;
  int visible_begin;  // keys [visible_begin, visible_end) are visible to some row of the group
  int visible_end;
  int full_begin;  // keys [full_begin, full_end) are visible to every row of the group
  int full_end;

  __device__ int first_key(int row) const { return max(0, row + begin_shift); }
  __device__ int end_key(int row) const { return min(seqlen_k, row + end_shift); }
};

// More tokens than a sequence may have (checked on the host); its double still fits an int.
inline constexpr int kMaxTokens = 1 << 30;

// Query row r sees the keys [max(0, r + begin), min(seqlen_k, r + end)).
struct KeyShifts {
  int begin;
  int end;
};

// The device form of visible_keys(): one addition and one comparison a side.
__device__ __forceinline__ KeyShifts key_shifts(const Mask& mask, int seqlen_q, int seqlen_k) {
  const int64_t offset = static_cast<int64_t>(seqlen_k) - seqlen_q;
  int64_t begin = -kMaxTokens;
  int64_t end = kMaxTokens - 1;
  if (mask.window_left >= 0) begin = max64(begin, offset - mask.window_left);
  if (mask.window_right >= 0) end = min64(end, offset + mask.window_right + 1);
  if (mask.causal) end = min64(end, offset + 1);
  return {static_cast<int>(begin), static_cast<int>(end)};
}

__device__ __forceinline__ void set_visibility(const Mask& mask, WorkTile* tile) {
  const KeyShifts shifts = key_shifts(mask, tile->seqlen_q, tile->seqlen_k);
  tile->begin_shift = shifts.begin;
  tile->end_shift = shifts.end;
  // The first row bounds the left side of what some row sees, the last row that of what all see.
  const int last_row = tile->row_end - 1;
  tile->visible_begin = tile->first_key(tile->row_begin);
  tile->visible_end = max(tile->visible_begin, tile->end_key(last_row));
  tile->full_begin = tile->first_key(last_row);
  tile->full_end = tile->end_key(tile->row_begin);
}

// Upper bound of row groups over all sequences: what the host can know without reading cu_seqlens.
ATTNSIEVE_HD int64_t max_row_groups(const AttendProblem& p) {
  if (p.varlen.cu_seqlens_q != nullptr) return p.seqlen_q / kGroupRows + p.batch;
  return p.batch * ((p.seqlen_q + kGroupRows - 1) / kGroupRows);
}

struct TokenRange {
  int64_t begin;
  int64_t length;
};

// Sequence `b` of a varlen tensor; malformed offsets are clamped so that no access leaves the
// tensor.
__device__ __forceinline__ TokenRange sequence_tokens(const int32_t* cu_seqlens, int64_t b,
                                                      int64_t total) {
  const int64_t begin = max64(0, min64(cu_seqlens[b], total));
  const int64_t end = max64(begin, min64(cu_seqlens[b + 1], total));
  return {begin, end - begin};
}

struct Sequence {
  int token_q;  // first token in a varlen tensor, 0 when batched or paged
  int seqlen_q;
  int token_k;
  int seqlen_k;
};

__device__ __forceinline__ Sequence load_sequence(const AttendProblem& p, int batch) {
  Sequence sequence{0, static_cast<int>(p.seqlen_q), 0, static_cast<int>(p.seqlen_k)};
  if (p.varlen.cu_seqlens_q != nullptr) {
    const TokenRange tokens = sequence_tokens(p.varlen.cu_seqlens_q, batch, p.seqlen_q);
    sequence.token_q = static_cast<int>(tokens.begin);
    sequence.seqlen_q = static_cast<int>(tokens.length);
  }
  if (p.varlen.cu_seqlens_k != nullptr) {
    const TokenRange tokens = sequence_tokens(p.varlen.cu_seqlens_k, batch, p.seqlen_k);
    sequence.token_k = static_cast<int>(tokens.begin);
    sequence.seqlen_k = static_cast<int>(tokens.length);
  }
  if (p.paged.seq_lens != nullptr) {
    sequence.seqlen_k = max(0, min(p.paged.seq_lens[batch], sequence.seqlen_k));
  }
  return sequence;
}

// Finds the sequence that owns row tile `tile` when every sequence is cut into tiles of
// `tile_rows`, the first of which may start `lead_rows` early; 32 sequences a step, every warp does
// the same search.
__device__ __forceinline__ bool find_sequence(const AttendProblem& p, int64_t tile, int tile_rows,
                                              int lead_rows, int* batch, int* tile_in_sequence) {
  const int lane = threadIdx.x % kWarpThreads;
  int64_t passed = 0;
  for (int64_t base = 0; base < p.batch; base += kWarpThreads) {
    int64_t tiles = 0;
    if (base + lane < p.batch) {
      const TokenRange tokens = sequence_tokens(p.varlen.cu_seqlens_q, base + lane, p.seqlen_q);
      tiles = (tokens.length + lead_rows + tile_rows - 1) / tile_rows;
    }
    int64_t inclusive = tiles;
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      const int64_t below = __shfl_up_sync(0xffffffffu, inclusive, distance);
      if (lane >= distance) inclusive += below;
    }
    const unsigned owners = __ballot_sync(0xffffffffu, passed + inclusive > tile);
    if (owners != 0) {
      const int owner = __ffs(owners) - 1;
      *batch = static_cast<int>(base) + owner;
      *tile_in_sequence =
          static_cast<int>(tile - passed - __shfl_sync(0xffffffffu, inclusive - tiles, owner));
      return true;
    }
    passed += __shfl_sync(0xffffffffu, inclusive, kWarpThreads - 1);
  }
  return false;
}

// CTA order: heads outermost so that concurrent CTAs share K and V in L2, last rows first because
// causal rows grow.
__device__ __forceinline__ WorkTile locate_work(const AttendProblem& p, unsigned cta) {
  WorkTile tile{};
  const unsigned groups = static_cast<unsigned>(max_row_groups(p));
  int64_t group = groups - 1 - cta % groups;
  tile.head = static_cast<int>(cta / groups);
  tile.kv_head = tile.head / static_cast<int>(p.num_heads / p.num_kv_heads);
  tile.valid = true;
  if (p.varlen.cu_seqlens_q != nullptr) {
    int group_in_sequence = 0;
    tile.valid = find_sequence(p, group, kGroupRows, 0, &tile.batch, &group_in_sequence);
    if (!tile.valid) return tile;
    group = group_in_sequence;
  } else {
    const int groups_per_sequence = static_cast<int>(groups / static_cast<unsigned>(p.batch));
    tile.batch = static_cast<int>(group / groups_per_sequence);
    group %= groups_per_sequence;
  }
  const Sequence sequence = load_sequence(p, tile.batch);
  tile.token_q = sequence.token_q;
  tile.seqlen_q = sequence.seqlen_q;
  tile.token_k = sequence.token_k;
  tile.seqlen_k = sequence.seqlen_k;
  tile.row_begin = static_cast<int>(group) * kGroupRows;
  tile.row_end = min(tile.row_begin + kGroupRows, tile.seqlen_q);
  set_visibility(p.mask, &tile);
  return tile;
}

}  // namespace attnsieve
