#include <cmath>
#include <vector>

#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/layout.h"
#include "python/bindings/ops.h"
#include "python/bindings/rules.h"

namespace attnsieve::binding {
namespace {

// How the tensors are laid out. Any kind of q goes with pages; without them k and v follow q.
struct Layout {
  bool varlen;  // q [tokens, heads, head_dim], not [batch, heads, seqlen, head_dim]
  bool paged;   // k, v [pages, page_size, heads, head_dim]
};

Dims q_dims(Layout layout) { return layout.varlen ? kVarlen : kBatched; }
Dims k_dims(Layout layout) { return layout.paged ? kPaged : q_dims(layout); }

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v, Layout layout) {
  const char* const kTokens = "[tokens, heads, head_dim]";
  const char* const kBatch = "[batch, heads, seqlen, head_dim]";
  const char* q_shape = layout.varlen ? kTokens : kBatch;
  const char* k_shape = layout.paged ? "[pages, page_size, kv heads, head_dim]" : q_shape;
  const Dims of_q = q_dims(layout);
  const Dims of_k = k_dims(layout);
  check_dim("q", q, layout.varlen ? 3 : 4, q_shape);
  check_dim("k", k, layout.paged || !layout.varlen ? 4 : 3, k_shape);
  check_dim("v", v, k.dim(), k_shape);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_same_device(name, tensor, q);
    check_dtype(name, tensor, q.scalar_type());
    check_size(name, tensor, of_k.last, q.size(of_q.last), "head_dim of q");
    if (layout.paged) {
      check_size(name, tensor, 0, k.size(0), "pages of k");
    } else if (!layout.varlen) {
      check_size(name, tensor, 0, q.size(0), "batch of q");
    }
    check_size(name, tensor, of_k.head, k.size(of_k.head), "heads of k");
    check_size(name, tensor, of_k.row, k.size(of_k.row),
               layout.paged ? "page_size of k" : "length of k");
  }
  const int64_t num_heads = q.size(of_q.head);
  const int64_t num_kv_heads = k.size(of_k.head);
  if (num_kv_heads == 0) invalid("k", "needs at least one head, got shape ", shape_of(k));
  if (num_heads == 0 || num_heads % num_kv_heads != 0) {
    invalid("q", "the number of heads must be a positive multiple of k's ", num_kv_heads, ", got ",
            num_heads);
  }
}

Layout layout_of(const Tensor& q, const std::optional<Tensor>& cu_seqlens_q,
                 const std::optional<Tensor>& cu_seqlens_k,
                 const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens) {
  if (block_table.has_value() != seq_lens.has_value()) {
    invalid(block_table ? "seq_lens" : "block_table",
            "block_table and seq_lens must be given together, or neither");
  }
  const Layout layout{cu_seqlens_q.has_value() || cu_seqlens_k.has_value(),
                      block_table.has_value()};
  if (layout.paged && cu_seqlens_k) {
    invalid("cu_seqlens_k", "must be absent where K and V are paged: seq_lens says their lengths");
  }
  if (layout.varlen && !layout.paged && (!cu_seqlens_q || !cu_seqlens_k)) {
    invalid(cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q",
            "both cu_seqlens must be given, or neither");
  }
  if (cu_seqlens_q) check_cu_seqlens("cu_seqlens_q", *cu_seqlens_q, q);
  if (cu_seqlens_k) {
    check_cu_seqlens("cu_seqlens_k", *cu_seqlens_k, q);
    check_size("cu_seqlens_k", *cu_seqlens_k, 0, cu_seqlens_q->size(0), "length of cu_seqlens_q");
  }
  return layout;
}

PagedKv paged_kv(const Tensor& q, const Tensor& k, int64_t batch, const Tensor& block_table,
                 const Tensor& seq_lens) {
  check_dim("block_table", block_table, 2, "[batch, max pages]");
  check_dim("seq_lens", seq_lens, 1, "[batch]");
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"block_table", block_table},
        {"seq_lens", seq_lens}}) {
    check_dtype(name, tensor, ScalarType::Int);
    check_same_device(name, tensor, q);
    check_last_contiguous(name, tensor);
    check_size(name, tensor, 0, batch, "batch");
  }
  constexpr int64_t kPageAlignment = 16;
  const int64_t page_size = k.size(kPaged.row);
  if (page_size == 0 || page_size % kPageAlignment != 0) {
    invalid("k", "page_size (dimension 1) must be a positive multiple of ", kPageAlignment,
            ", got shape ", shape_of(k));
  }
  const int64_t max_pages = block_table.size(1);
  if (max_pages > INT32_MAX / page_size) {
    invalid("block_table", "a row holds at most 2^31 - 1 keys, got ", max_pages, " pages of ",
            page_size);
  }
  PagedKv paged;
  paged.block_table = block_table.const_data_ptr<int32_t>();
  paged.seq_lens = seq_lens.const_data_ptr<int32_t>();
  paged.table_stride_batch = block_table.stride(0);
  paged.num_pages = k.size(0);
  paged.page_size = static_cast<int32_t>(page_size);
  paged.max_pages = static_cast<int32_t>(max_pages);
  return paged;
}

// The dispatcher chooses among the backends of a GPU; here it is enough that one of them serves the
// call.
void require_backend(const Tensor& q, const AttendProblem& problem) {
  if (!q.is_cuda()) {
    return require_supported("attend", Backend::kCpu, problem.dtype, problem.head_dim);
  }
  std::string supported;
  for (const Capability& row : capabilities()) {
    if (row.op != std::string("attend") || row.backend == Backend::kCpu) continue;
    if (row.supports(problem.dtype, problem.head_dim)) return;
    supported += (supported.empty() ? "" : "; ") + std::string(backend_name(row.backend)) + ": " +
                 row.supported();
  }
  throw Unsupported("attend on CUDA got dtype " + std::string(dtype_name(problem.dtype)) +
                    ", head_dim " + std::to_string(problem.head_dim) + "; supported: " + supported);
}

BlockIndexView block_index_view(const AttendProblem& problem, const Tensor& q,
                                const std::optional<Tensor>& counts,
                                const std::optional<Tensor>& columns, int64_t block_q,
                                int64_t block_k) {
  BlockIndexView view;
  view.block_q = check_block("block_q", block_q);
  view.block_k = check_block_k(block_k);
  if (counts.has_value() != columns.has_value()) {
    invalid(counts ? "columns" : "counts", "index counts and columns must be given together");
  }
  if (!counts) return view;
  check_dim("index.counts", *counts, 3, "[batch, index heads, q blocks]");
  check_dim("index.columns", *columns, 4, "[batch, index heads, q blocks, capacity]");
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"index.counts", *counts},
                                     {"index.columns", *columns}}) {
    check_dtype(name, tensor, ScalarType::Int);
    check_same_device(name, tensor, q);
    check_last_contiguous(name, tensor);
    check_size(name, tensor, 0, problem.batch, "batch");
    check_size(name, tensor, 1, counts->size(1), "index heads");
    check_size(name, tensor, 2, counts->size(2), "q blocks");
  }
  const int64_t index_heads = counts->size(1);
  if (index_heads != problem.num_heads && index_heads != problem.num_kv_heads && index_heads != 1) {
    invalid("index", "the number of index heads must be 1, ", problem.num_kv_heads,
            " (kv heads) or ", problem.num_heads, " (query heads), got ", index_heads);
  }
  if (!problem.is_varlen()) {
    const int64_t rows = (problem.seqlen_q + block_q - 1) / block_q;
    check_size("index.counts", *counts, 2, rows, "ceil(seqlen_q / block_q)");
  }
  view.counts = counts->const_data_ptr<int32_t>();
  view.columns = columns->const_data_ptr<int32_t>();
  view.counts_stride_batch = counts->stride(0);
  view.counts_stride_head = counts->stride(1);
  view.columns_stride_batch = columns->stride(0);
  view.columns_stride_head = columns->stride(1);
  view.columns_stride_row = columns->stride(2);
  view.num_rows = static_cast<int32_t>(counts->size(2));
  view.capacity = static_cast<int32_t>(columns->size(3));
  view.heads_per_list = static_cast<int32_t>(problem.num_heads / index_heads);
  return view;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& counts,
    const std::optional<Tensor>& columns, int64_t block_q, int64_t block_k,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
    const std::optional<Tensor>& sink, std::optional<double> threshold,
    const std::optional<Tensor>& threshold_per_head, int64_t skip_block, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right) {
  const Layout layout = layout_of(q, cu_seqlens_q, cu_seqlens_k, block_table, seq_lens);
  check_qkv(q, k, v, layout);
  const Dims of_q = q_dims(layout);
  const Dims of_k = k_dims(layout);
  const bool varlen = layout.varlen;
  AttendProblem problem;
  problem.batch = varlen ? cu_seqlens_q->size(0) - 1 : q.size(0);
  problem.num_heads = q.size(of_q.head);
  problem.num_kv_heads = k.size(of_k.head);
  problem.seqlen_q = q.size(of_q.row);
  problem.seqlen_k = k.size(of_k.row);
  if (layout.paged) {
    problem.paged = paged_kv(q, k, problem.batch, *block_table, *seq_lens);
    problem.seqlen_k = problem.paged.capacity();
  }
  problem.head_dim = q.size(of_q.last);
  problem.dtype = element_dtype("q", q, kOnCpuOnly);
  require_backend(q, problem);
  check_aligned_rows("q", q);
  check_aligned_rows("k", k);
  check_aligned_rows("v", v);
  problem.mask = make_mask(causal, window_left, window_right);
  problem.softmax_scale = checked_scale(softmax_scale);
  if (cu_seqlens_q) problem.varlen.cu_seqlens_q = cu_seqlens_q->const_data_ptr<int32_t>();
  if (cu_seqlens_k) problem.varlen.cu_seqlens_k = cu_seqlens_k->const_data_ptr<int32_t>();
  problem.index = block_index_view(problem, q, counts, columns, block_q, block_k);
  problem.sink = head_sinks(sink, problem.num_heads, q);
  problem.threshold = make_threshold(threshold, threshold_per_head, skip_block, problem.batch,
                                     problem.num_heads, q);

  const Tensor out = allocate_out(q, varlen);
  const int32_t float_dtype = aoti_torch_dtype_float32();
  const Tensor lse =
      varlen ? empty({problem.seqlen_q, problem.num_heads}, float_dtype, q)
             : empty({problem.batch, problem.num_heads, problem.seqlen_q}, float_dtype, q);
  const Tensor counters = problem.threshold.enabled ? empty({problem.batch, problem.num_heads, 2},
                                                            aoti_torch_dtype_int64(), q)
                                                    : empty({0}, aoti_torch_dtype_int64(), q);
  problem.q = head_tensor(q, of_q);
  problem.k = head_tensor(k, of_k);
  problem.v = head_tensor(v, of_k);
  problem.out = head_tensor(out, of_q);
  problem.lse = row_tensor(lse, varlen);
  if (problem.threshold.enabled) problem.threshold.counters = counters.mutable_data_ptr<int64_t>();
  std::optional<Tensor> workspace;
  if (q.is_cuda()) {
    const DeviceScope scope(q);
    const size_t bytes = cuda::attend_workspace_bytes(problem);
    if (bytes > 0) {
      workspace = empty({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8(), q);
      problem.workspace = workspace->mutable_data_ptr();
    }
  }
  run<AttendProblem>(q, problem, cpu::attend, cuda::attend);
  return {out, lse, counters};
}

}  // namespace attnsieve::binding
