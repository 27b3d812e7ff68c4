// What the host hands the sm_90 attend kernel: the problem, its tensor maps and its grid.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <cutlass/fast_math.h>

#include "attnsieve/problem.h"
#include "attnsieve/visibility.h"
#include "cuda/dispatch/heuristics.h"

namespace attnsieve::sm90 {

inline constexpr int kWarpgroupRows = 64;  // rows of a wgmma, and of a box of Q

// How the host laid out the call. K and V tiles are composed of boxes of piece_keys rows.
struct AttendArguments {
  AttendProblem problem;
  CUtensorMap q;  // (head_dim, rows, heads, batch), box (kSliceColumns, 64)
  // (kSliceColumns, rows, slices, heads, batch or page), box (kSliceColumns, piece_keys, box_slices)
  CUtensorMap k;
  CUtensorMap v;
  // Interleaved configurations only, where k and v have boxes of 8 rows of all slices: (kSliceColumns, 8, slices, groups of 8 rows, heads), box
  // piece_keys rows. Where a piece does not start at a group, k and v take it 8 rows at a time.
  CUtensorMap k_groups;
  CUtensorMap v_groups;
  // Coordinates of k_groups and v_groups: row = batch or page * rows_per_batch + row in it, head =
  // batch * heads_per_batch + head. Rows from group_rows on are not reached through them.
  int rows_per_batch;
  int heads_per_batch;
  int64_t group_rows;
  int piece_keys;
  int log2_piece_keys;
  int box_slices;  // slices of a box of k and v: all, or one
  unsigned* next_item;  // items handed out beyond one a CTA; nullptr: every CTA has its fixed share
  int num_items;  // work items: (head slot, row tile)
  cutlass::FastDivmod row_tiles;  // of all sequences, at most
  cutlass::FastDivmod tiles_per_sequence;  // where all sequences have as many
  cutlass::FastDivmod slots_per_kv_head;  // items that share a row tile and a KV head
  cutlass::FastDivmod heads_per_list;  // of an index
  int group_size;  // query heads of a KV head
  int lead_rows;  // rows by which a sequence's first row tile may start early
  bool pack_heads;  // a work item is 64 rows of kWarpgroups heads of one KV group
};

// Columns of one swizzled slice of a row, and slices of a row.
constexpr int slice_columns(int64_t head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

// Work items of a problem. The result fits an int, or InvalidArgument.
struct ItemCount {
  int items;
  int row_tiles;
  int lead_rows;
};
ItemCount count_items(const AttendProblem& problem, const AttendPlan& plan);

AttendArguments make_arguments(const AttendProblem& problem, const AttendPlan& plan);

}  // namespace attnsieve::sm90
