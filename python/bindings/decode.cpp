// decode: checks of the index, tensors -> DecodeProblem.
#include "python/bindings/backend.h"
#include "python/bindings/decode_problem.h"
#include "python/bindings/ops.h"
#include "python/bindings/pages.h"

namespace attnsieve::binding {
namespace {

void set_index(DecodeProblem* problem, const Tensor& q, const std::optional<Tensor>& indices,
               const std::optional<Tensor>& counts, int64_t page_size, bool physical) {
  if (!indices) {
    if (counts) invalid("index.counts", "given without indices");
    return;
  }
  const int64_t lists = indices->dim() - 2;  // the dimension of the list heads
  if (lists != 1 && lists != 2) {
    invalid("index.indices", "expected [batch, index heads, k] or [batch, rows, index heads, k], ",
            "got shape ", shape_of(*indices));
  }
  check_dtype("index.indices", *indices, ScalarType::Int);
  check_same_device("index.indices", *indices, q);
  check_last_contiguous("index.indices", *indices);
  check_size("index.indices", *indices, 0, problem->batch, "batch");
  if (lists == 2) check_size("index.indices", *indices, 1, problem->seqlen_q, "rows of q");
  const int64_t heads = indices->size(lists);
  if (heads != problem->num_heads && heads != problem->num_kv_heads && heads != 1) {
    invalid("index", "the number of index heads must be 1, ", problem->num_kv_heads,
            " (kv heads) or ", problem->num_heads, " (query heads), got ", heads);
  }
  if (page_size <= 0 || page_size > INT32_MAX || indices->size(lists + 1) > INT32_MAX)
    invalid("index.page_size", "expected a number in [1, 2**31), got ", page_size);
  if (physical && (problem->paged.block_table == nullptr || page_size != 1)) {
    invalid("index", "physical entries are slots of single tokens and need a block_table");
  }
  TokenIndexView& view = problem->index;
  view.indices = indices->const_data_ptr<int32_t>();
  view.indices_stride_batch = indices->stride(0);
  view.indices_stride_row = lists == 2 ? indices->stride(1) : 0;
  view.indices_stride_head = indices->stride(lists);
  view.num_rows = lists == 2 ? static_cast<int32_t>(problem->seqlen_q) : 1;
  view.capacity = static_cast<int32_t>(indices->size(lists + 1));
  view.heads_per_list = static_cast<int32_t>(problem->num_heads / heads);
  view.page_size = page_size;
  view.physical = physical;
  if (!counts) return;
  check_dim("index.counts", *counts, lists + 1, "as indices without k");
  check_dtype("index.counts", *counts, ScalarType::Int);
  check_same_device("index.counts", *counts, q);
  for (int64_t dim = 0; dim <= lists; ++dim)
    check_size("index.counts", *counts, dim, indices->size(dim), "as indices");
  view.counts = counts->const_data_ptr<int32_t>();
  view.counts_stride_batch = counts->stride(0);
  view.counts_stride_row = lists == 2 ? counts->stride(1) : 0;
  view.counts_stride_head = counts->stride(lists);
}

}  // namespace

std::tuple<Tensor, Tensor> decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
    const std::optional<Tensor>& indices, const std::optional<Tensor>& counts,
    int64_t index_page_size, bool physical, const std::optional<Tensor>& dense_begin,
    int64_t recent, const std::optional<Tensor>& sink, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, double softmax_scale, bool causal, int64_t num_splits) {
  DecodeProblem problem = decode_problem("decode", q, k_cache, v_cache, block_table, seq_lens, sink,
                                         k_scale, v_scale, softmax_scale, causal);
  set_index(&problem, q, indices, counts, index_page_size, physical);
  problem.dense_begin = per_sequence("dense_begin", dense_begin, problem.batch, q);
  if (recent < 0) invalid("recent", "expected a number >= 0, got ", recent);
  problem.recent = recent;
  if (!indices && (dense_begin || recent > 0)) {
    invalid("dense_begin, recent", "everything is attended without an index");
  }
  if (num_splits < 0 || num_splits > kMaxDecodeSplits) {
    invalid("num_splits", "expected a number in [0, ", kMaxDecodeSplits, "], got ", num_splits);
  }
  problem.num_splits = static_cast<int32_t>(num_splits);
  const auto [out, lse] = decode_outputs(q, &problem);
  std::optional<Tensor> workspace;
  if (q.is_cuda()) {
    const int64_t bytes = static_cast<int64_t>(cuda::decode_workspace_bytes(problem));
    if (bytes > 0) {
      workspace = empty({bytes}, aoti_torch_dtype_uint8(), q);
      problem.workspace = workspace->mutable_data_ptr();
    }
  }
  run<DecodeProblem>(q, problem, cpu::decode, cuda::decode);
  return {out, lse};
}

}  // namespace attnsieve::binding
