// From an item number to the query rows it owns. Heads are outermost so that concurrent CTAs share
// K and V in L2, last rows first because causal rows grow.
#pragma once

#include "cuda/sm90/attend/config.h"

namespace attnsieve::sm90 {

// Fills everything but `tiles`. False where the item lies behind its sequence's last row.
template <class Config>
__device__ __forceinline__ bool locate(const AttendArguments& a, int item, Work* work) {
  const AttendProblem& p = a.problem;
  const int heads_per_item = a.pack_heads ? Config::kWarpgroups : 1;
  const int rows_per_item = a.pack_heads ? kGroupRows : Config::kWarpgroups * kGroupRows;
  int head_slot;
  int tile;
  a.row_tiles(head_slot, tile, item);
  tile = a.row_tiles.divisor - 1 - tile;

  int slot_in_group;
  a.slots_per_kv_head(work->kv_head, slot_in_group, head_slot);
  work->head = work->kv_head * a.group_size + slot_in_group * heads_per_item;
  work->head_end = (work->kv_head + 1) * a.group_size;

  if (p.varlen.cu_seqlens_q != nullptr) {
    if (!find_sequence(p, tile, rows_per_item, a.lead_rows, &work->batch, &tile)) return false;
  } else {
    a.tiles_per_sequence(work->batch, tile, tile);
  }
  const Sequence sequence = load_sequence(p, work->batch);
  work->token_q = sequence.token_q;
  work->seqlen_q = sequence.seqlen_q;
  work->token_k = sequence.token_k;
  work->seqlen_k = sequence.seqlen_k;

  const KeyShifts shifts = key_shifts(p.mask, sequence.seqlen_q, sequence.seqlen_k);
  work->begin_shift = shifts.begin;
  work->end_shift = shifts.end;
  work->row = tile * rows_per_item;
  if (a.lead_rows > 0) work->row += first_row_of_tiles(shifts.end, Config::kTileN);
  const int first_row = max(work->row, 0);
  const int last_row = min(work->row + rows_per_item, sequence.seqlen_q) - 1;
  if (last_row < first_row) return false;
  int list_row = first_row;  // a list is cut by what its whole q-block sees
  int list_last_row = last_row;
  if (p.index.counts != nullptr) {
    list_row = first_row & ~(p.index.block_q - 1);
    list_last_row = min(list_row + p.index.block_q, sequence.seqlen_q) - 1;
  }
  work->visible_begin = work->first_key(list_row);
  work->visible_end = max(work->visible_begin, work->end_key(list_last_row));
  work->full_begin = work->first_key(last_row);
  work->full_end = work->end_key(first_row);
  return true;
}

}  // namespace attnsieve::sm90
