// decode: checks, outputs, tensors -> DecodeProblem.
#include <cmath>

#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/layout.h"
#include "python/bindings/ops.h"
#include "python/bindings/pages.h"

namespace attnsieve::binding {
namespace {

void check_caches(const Tensor& q, const Tensor& k, const Tensor& v, bool paged) {
  const char* const shape =
      paged ? "[pages, page_size, kv heads, head_dim]" : "[batch, kv heads, capacity, head_dim]";
  check_dim("q", q, 4, "[batch, heads, rows, head_dim]");
  for (const auto& [name, cache] :
       {std::pair<const char*, const Tensor&>{"k_cache", k}, {"v_cache", v}}) {
    check_dim(name, cache, 4, shape);
    check_same_device(name, cache, q);
    check_dtype(name, cache, k.scalar_type());
    check_size(name, cache, 3, q.size(3), "head_dim of q");
    if (!paged) check_size(name, cache, 0, q.size(0), "batch of q");
    for (int64_t dim = 0; dim < 3; ++dim) check_size(name, cache, dim, k.size(dim), "as k_cache");
  }
  const int64_t num_kv_heads = k.size(paged ? kPaged.head : kBatched.head);
  if (num_kv_heads == 0) invalid("k_cache", "needs at least one head, got shape ", shape_of(k));
  if (q.size(1) == 0 || q.size(1) % num_kv_heads != 0) {
    invalid("q", "the number of heads must be a positive multiple of k_cache's ", num_kv_heads,
            ", got ", q.size(1));
  }
  if (q.size(2) > kMaxDecodeRows) {
    invalid("q", "expected at most ", kMaxDecodeRows, " new rows, got shape ", shape_of(q));
  }
}

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
  const bool paged = block_table.has_value();
  DecodeProblem problem;
  problem.dtype = element_dtype("q", q, kOnCpuOnly);
  problem.code = cache_code("k_cache", k_cache, q, false);
  check_caches(q, k_cache, v_cache, paged);
  const Dims of_k = paged ? kPaged : kBatched;
  problem.batch = q.size(0);
  problem.num_heads = q.size(1);
  problem.num_kv_heads = k_cache.size(of_k.head);
  problem.seqlen_q = q.size(2);
  problem.head_dim = q.size(3);
  if (!q.is_cuda()) require_supported("decode", Backend::kCpu, problem.dtype, problem.head_dim);
  check_aligned_rows("q", q);
  check_aligned_rows("k_cache", k_cache);
  check_aligned_rows("v_cache", v_cache);
  const bool coded = problem.code != Code::kNone;
  problem.k_scale = head_scales("k_scale", k_scale, coded, problem.num_kv_heads, k_cache);
  problem.v_scale = head_scales("v_scale", v_scale, coded, problem.num_kv_heads, k_cache);
  problem.softmax_scale = static_cast<float>(softmax_scale);
  if (!(problem.softmax_scale > 0.0f) || std::isinf(problem.softmax_scale)) {
    invalid("softmax_scale", "expected a positive finite number, got ", softmax_scale);
  }
  problem.causal = causal;
  problem.paged = paged_kv("k_cache", k_cache.size(0), k_cache.size(1), block_table, seq_lens,
                           problem.batch, q);
  problem.seqlen_k = paged ? problem.paged.capacity() : k_cache.size(2);
  set_index(&problem, q, indices, counts, index_page_size, physical);
  problem.dense_begin = per_sequence("dense_begin", dense_begin, problem.batch, q);
  if (recent < 0) invalid("recent", "expected a number >= 0, got ", recent);
  problem.recent = recent;
  if (!indices && (dense_begin || recent > 0)) {
    invalid("dense_begin, recent", "everything is attended without an index");
  }
  if (sink) {
    check_dim("sink", *sink, 1, "[query heads]");
    check_dtype("sink", *sink, ScalarType::Float);
    check_size("sink", *sink, 0, problem.num_heads, "query heads");
    check_same_device("sink", *sink, q);
    check_last_contiguous("sink", *sink);
    problem.sink = sink->const_data_ptr<float>();
  }
  if (num_splits < 0 || num_splits > kMaxDecodeSplits) {
    invalid("num_splits", "expected a number in [0, ", kMaxDecodeSplits, "], got ", num_splits);
  }
  problem.num_splits = static_cast<int32_t>(num_splits);
  const Tensor out = allocate_out(q, false);
  const Tensor lse =
      empty({problem.batch, problem.num_heads, problem.seqlen_q}, aoti_torch_dtype_float32(), q);
  problem.q = head_tensor(q, kBatched);
  problem.k = head_tensor(k_cache, of_k);
  problem.v = head_tensor(v_cache, of_k);
  problem.out = head_tensor(out, kBatched);
  problem.lse = row_tensor(lse, false);
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
