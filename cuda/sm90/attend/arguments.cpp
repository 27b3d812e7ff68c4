#include "cuda/sm90/attend/arguments.h"

#include <algorithm>
#include <limits>
#include <string>

#include "cuda/dispatch/tensor_map.h"

namespace attnsieve::sm90 {
namespace {

using cuda::make_tensor_map;
using cuda::TensorMapShape;

// Rows, heads and outer dimension (batch, page, or 1 for varlen) of a tensor.
struct Extent {
  int64_t rows;
  int64_t heads;
  int64_t outer;
};

// An empty tensor has no address that a map may hold. Nothing is read through its map, or only
// what lies outside every tensor; q, which is not empty, stands in.
bool is_empty(const Extent& extent) {
  return extent.rows == 0 || extent.heads == 0 || extent.outer == 0;
}

CUtensorMap query_map(const AttendProblem& p, const Extent& extent) {
  TensorMapShape shape;
  shape.rank = 4;
  shape.sizes = {p.head_dim, extent.rows, extent.heads, extent.outer};
  shape.strides = {1, p.q.stride_row, p.q.stride_head, p.q.stride_batch};
  shape.box = {slice_columns(p.head_dim), kWarpgroupRows, 1, 1};
  return make_tensor_map(p.q.data, p.dtype, shape);
}

// `rows` of `box_slices` slices a box: the order of a tile whose slices stand behind each other, or,
// 8 rows of all slices, of an interleaved one.
CUtensorMap slice_map(const AttendProblem& p, const HeadTensor& tensor, const Extent& extent,
                      int box_rows, int box_slices) {
  if (is_empty(extent)) return slice_map(p, p.q, {1, 1, 1}, box_rows, box_slices);
  const int columns = slice_columns(p.head_dim);
  const int slices = static_cast<int>(p.head_dim) / columns;
  TensorMapShape shape;
  shape.rank = 5;
  shape.sizes = {columns, extent.rows, slices, extent.heads, extent.outer};
  shape.strides = {1, tensor.stride_row, columns, tensor.stride_head, tensor.stride_batch};
  shape.box = {columns, box_rows, box_slices, 1, 1};
  return make_tensor_map(tensor.data, p.dtype, shape);
}

// The merges of (outer, head, row) into two dimensions that a five-dimensional map of 8-row groups
// leaves room for.
enum class GroupMerge { kNone, kHeads, kRows };

GroupMerge group_merge(const HeadTensor& tensor, const Extent& extent) {
  if (extent.outer == 1 || tensor.stride_batch == extent.rows * tensor.stride_row) {
    return GroupMerge::kRows;
  }
  return tensor.stride_batch == extent.heads * tensor.stride_head ? GroupMerge::kHeads
                                                                  : GroupMerge::kNone;
}

CUtensorMap group_map(const AttendProblem& p, const HeadTensor& tensor, int64_t rows, int64_t heads,
                      int piece_keys) {
  const int columns = slice_columns(p.head_dim);
  const int slices = static_cast<int>(p.head_dim) / columns;
  TensorMapShape shape;
  shape.rank = 5;
  shape.sizes = {columns, 8, slices, rows / 8, heads};
  shape.strides = {1, tensor.stride_row, columns, 8 * tensor.stride_row, tensor.stride_head};
  shape.box = {columns, 8, slices, piece_keys / 8, 1};
  return make_tensor_map(tensor.data, p.dtype, shape);
}

void set_interleaved_maps(const AttendProblem& p, const Extent& extent, AttendArguments* a) {
  const int slices = static_cast<int>(p.head_dim) / slice_columns(p.head_dim);
  a->box_slices = slices;
  a->k = slice_map(p, p.k, extent, 8, slices);
  a->v = slice_map(p, p.v, extent, 8, slices);
  a->k_groups = a->k;
  a->v_groups = a->v;
  const GroupMerge merge = group_merge(p.k, extent);
  const bool by_rows = merge == GroupMerge::kRows;
  const int64_t rows = by_rows ? extent.rows * extent.outer : extent.rows;
  const int64_t heads = by_rows ? extent.heads : extent.heads * extent.outer;
  if (merge == GroupMerge::kNone || merge != group_merge(p.v, extent) || rows < 8) return;
  a->k_groups = group_map(p, p.k, rows, heads, a->piece_keys);
  a->v_groups = group_map(p, p.v, rows, heads, a->piece_keys);
  a->rows_per_batch = by_rows ? static_cast<int>(extent.rows) : 0;
  a->heads_per_batch = by_rows ? 0 : static_cast<int>(extent.heads);
  a->group_rows = rows / 8 * 8;
}

// Rows that the first row tile of a sequence may start early. Where only the device knows the
// lengths, room for the shift is kept. Every group has its own last tile where tiles are of 64 keys:
// nothing to gain, nor needed without votes.
int lead_rows_of(const AttendProblem& p, const AttendPlan& plan) {
  if (plan.warpgroups == 1 || plan.tile_n == kGroupRows || p.is_indexed()) return 0;
  if (!p.mask.causal && p.mask.window_right < 0) return 0;
  if (p.is_varlen() || p.is_paged()) return kGroupRows;
  const int64_t right = p.mask.causal ? 0 : p.mask.window_right;
  const int64_t end_shift = (p.seqlen_k - p.seqlen_q + right + 1) % plan.tile_n;
  return -first_row_of_tiles(static_cast<int>(end_shift), plan.tile_n);
}

}  // namespace

ItemCount count_items(const AttendProblem& problem, const AttendPlan& plan) {
  const int64_t tile_rows = plan.pack_heads ? kGroupRows : plan.warpgroups * kGroupRows;
  const int lead_rows = lead_rows_of(problem, plan);
  const int64_t rows = problem.seqlen_q + lead_rows;
  // Over B sequences of together T rows, ceil((t + lead) / tile) sums up to at most this.
  const int64_t row_tiles =
      problem.is_varlen() ? problem.seqlen_q / tile_rows + problem.batch * (lead_rows > 0 ? 2 : 1)
                          : problem.batch * ((rows + tile_rows - 1) / tile_rows);
  const int64_t heads_per_item = plan.pack_heads ? plan.warpgroups : 1;
  const int64_t head_slots =
      problem.num_kv_heads * ((problem.group_size() + heads_per_item - 1) / heads_per_item);
  const int64_t items = row_tiles * head_slots;
  if (items > std::numeric_limits<int32_t>::max() / 2) {
    throw InvalidArgument("attend (sm_90): the problem has " + std::to_string(items) +
                          " row tiles, more than 32 bits count");
  }
  return {static_cast<int>(items), static_cast<int>(row_tiles), lead_rows};
}

AttendArguments make_arguments(const AttendProblem& problem, const AttendPlan& plan) {
  constexpr int64_t kMaxListKeys = int64_t{1} << 30;  // list positions are counted in 32 bits
  if (problem.is_indexed() &&
      static_cast<int64_t>(problem.index.capacity) * problem.index.block_k > kMaxListKeys) {
    throw InvalidArgument("attend (sm_90): index.columns has room for more than 2^30 keys a row");
  }
  AttendArguments a{};
  a.problem = problem;
  if (plan.voted && !problem.threshold.enabled) {
    // Without a threshold the voting kernel keeps every tile.
    a.problem.threshold.value = 0.0f;
    a.problem.threshold.per_head = nullptr;
    a.problem.threshold.counters = nullptr;
  }
  a.piece_keys = plan.piece_keys;
  while ((2 << a.log2_piece_keys) <= a.piece_keys) ++a.log2_piece_keys;
  a.pack_heads = plan.pack_heads;

  const bool varlen = problem.is_varlen();
  a.q = query_map(problem, {problem.seqlen_q, problem.num_heads, varlen ? 1 : problem.batch});
  Extent keys{problem.seqlen_k, problem.num_kv_heads, varlen ? 1 : problem.batch};
  if (problem.is_paged()) {
    keys = {problem.paged.page_size, problem.num_kv_heads, problem.paged.num_pages};
  }
  if (plan.interleaved) {
    set_interleaved_maps(problem, keys, &a);
  } else {
    // A lane of the producer warps copies one slice; a self-fed warpgroup has one lane for all.
    const bool whole = plan.self_fed && plan.piece_keys == plan.tile_n;
    a.box_slices = whole ? static_cast<int>(problem.head_dim) / slice_columns(problem.head_dim) : 1;
    a.k = slice_map(problem, problem.k, keys, plan.piece_keys, a.box_slices);
    a.v = slice_map(problem, problem.v, keys, plan.piece_keys, a.box_slices);
  }

  const ItemCount count = count_items(problem, plan);
  a.num_items = count.items;
  a.row_tiles = cutlass::FastDivmod(count.row_tiles);
  a.tiles_per_sequence =
      cutlass::FastDivmod(std::max(1, count.row_tiles / static_cast<int>(problem.batch)));
  a.group_size = static_cast<int>(problem.group_size());
  const int heads_per_item = plan.pack_heads ? plan.warpgroups : 1;
  a.slots_per_kv_head = cutlass::FastDivmod((a.group_size + heads_per_item - 1) / heads_per_item);
  a.heads_per_list = cutlass::FastDivmod(std::max(1, problem.index.heads_per_list));
  a.lead_rows = count.lead_rows;
  if (plan.dynamic) a.next_item = static_cast<unsigned*>(problem.workspace);
  return a;
}

}  // namespace attnsieve::sm90
