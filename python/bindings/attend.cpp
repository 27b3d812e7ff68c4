#include <cmath>
#include <vector>

#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/ops.h"

namespace attnsieve::binding {
namespace {

// Dimension numbers of q, k, v in the batched [B, H, S, D] and the varlen [T, H, D] layout.
struct Dims {
  int64_t head;
  int64_t row;
  int64_t last;
};

Dims dims_of(bool varlen) { return varlen ? Dims{1, 0, 2} : Dims{1, 2, 3}; }

HeadTensor head_tensor(const Tensor& tensor, bool varlen) {
  const Dims dims = dims_of(varlen);
  return {const_cast<void*>(tensor.const_data_ptr()), varlen ? 0 : tensor.stride(0),
          tensor.stride(dims.head), tensor.stride(dims.row)};
}

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v, bool varlen) {
  const char* layout = varlen ? "[tokens, heads, head_dim]" : "[batch, heads, seqlen, head_dim]";
  const int64_t rank = varlen ? 3 : 4;
  check_dim("q", q, rank, layout);
  check_dim("k", k, rank, layout);
  check_dim("v", v, rank, layout);
  const Dims dims = dims_of(varlen);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_same_device(name, tensor, q);
    check_dtype(name, tensor, q.scalar_type());
    check_size(name, tensor, dims.last, q.size(dims.last), "head_dim of q");
    if (!varlen) check_size(name, tensor, 0, q.size(0), "batch of q");
    check_size(name, tensor, dims.head, k.size(dims.head), "heads of k");
    check_size(name, tensor, dims.row, k.size(dims.row), "length of k");
  }
  if (k.size(dims.head) == 0) invalid("k", "needs at least one head, got shape ", shape_of(k));
  if (q.size(dims.head) == 0 || q.size(dims.head) % k.size(dims.head) != 0) {
    invalid("q", "the number of heads must be a positive multiple of k's ", k.size(dims.head),
            ", got ", q.size(dims.head));
  }
}

int64_t varlen_batch(const Tensor& q, const std::optional<Tensor>& cu_seqlens_q,
                     const std::optional<Tensor>& cu_seqlens_k) {
  if (!cu_seqlens_q || !cu_seqlens_k) {
    invalid(cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q",
            "both cu_seqlens must be given, or neither");
  }
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor&>{"cu_seqlens_q", *cu_seqlens_q},
        {"cu_seqlens_k", *cu_seqlens_k}}) {
    check_dim(name, tensor, 1, "[batch + 1]");
    check_dtype(name, tensor, ScalarType::Int);
    check_same_device(name, tensor, q);
    check_last_contiguous(name, tensor);
    if (tensor.size(0) < 1)
      invalid(name, "expected [batch + 1] offsets, got shape ", shape_of(tensor));
    check_size(name, tensor, 0, cu_seqlens_q->size(0), "length of cu_seqlens_q");
  }
  return cu_seqlens_q->size(0) - 1;
}

BlockIndexView block_index_view(const AttendProblem& problem, const Tensor& q,
                                const std::optional<Tensor>& counts,
                                const std::optional<Tensor>& columns, int64_t block_q,
                                int64_t block_k) {
  BlockIndexView view;
  view.block_q = check_block("block_q", block_q);
  view.block_k = check_block("block_k", block_k);
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

// Same memory order as q where q is a [B, S, H, D] tensor seen as [B, H, S, D]; contiguous
// otherwise. python/attnsieve/_fake.py repeats this rule.
Tensor allocate_out(const Tensor& q, bool varlen) {
  const std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
  if (!varlen && sizes[1] > 1 && sizes[2] > 1 && q.stride(1) < q.stride(2) && q.stride(1) != 0) {
    const int64_t heads = sizes[1];
    const int64_t head_dim = sizes[3];
    return empty_strided(sizes, {sizes[2] * heads * head_dim, head_dim, heads * head_dim, 1},
                         raw_dtype(q), q);
  }
  return empty(sizes, raw_dtype(q), q);
}

RowTensor row_tensor(const Tensor& lse, bool varlen) {
  auto* data = lse.mutable_data_ptr<float>();
  if (varlen) return {data, 0, lse.stride(1), lse.stride(0)};
  return {data, lse.stride(0), lse.stride(1), lse.stride(2)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& counts,
    const std::optional<Tensor>& columns, int64_t block_q, int64_t block_k,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& sink, std::optional<double> threshold,
    const std::optional<Tensor>& threshold_per_head, int64_t skip_block, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right) {
  const bool varlen = cu_seqlens_q.has_value() || cu_seqlens_k.has_value();
  const int64_t varlen_sequences = varlen ? varlen_batch(q, cu_seqlens_q, cu_seqlens_k) : 0;
  check_qkv(q, k, v, varlen);
  const Dims dims = dims_of(varlen);
  AttendProblem problem;
  problem.batch = varlen ? varlen_sequences : q.size(0);
  problem.num_heads = q.size(dims.head);
  problem.num_kv_heads = k.size(dims.head);
  problem.seqlen_q = q.size(dims.row);
  problem.seqlen_k = k.size(dims.row);
  problem.head_dim = q.size(dims.last);
  problem.dtype = element_dtype("q", q);
  require_supported("attend", q.is_cuda() ? Backend::kSm80 : Backend::kCpu, problem.dtype,
                    problem.head_dim);
  check_aligned_rows("q", q);
  check_aligned_rows("k", k);
  check_aligned_rows("v", v);
  problem.mask = make_mask(causal, window_left, window_right);
  problem.softmax_scale = static_cast<float>(softmax_scale);
  if (!(problem.softmax_scale > 0.0f) || std::isinf(problem.softmax_scale)) {
    invalid("softmax_scale", "expected a positive finite number, got ", softmax_scale);
  }
  if (varlen) {
    problem.varlen = {cu_seqlens_q->const_data_ptr<int32_t>(),
                      cu_seqlens_k->const_data_ptr<int32_t>()};
  }
  problem.index = block_index_view(problem, q, counts, columns, block_q, block_k);
  if (sink) {
    check_dim("sink", *sink, 1, "[query heads]");
    check_dtype("sink", *sink, ScalarType::Float);
    check_size("sink", *sink, 0, problem.num_heads, "query heads");
    check_same_device("sink", *sink, q);
    check_last_contiguous("sink", *sink);
    problem.sink = sink->const_data_ptr<float>();
  }
  problem.threshold.skip_block = check_block("skip_block", skip_block);
  problem.threshold.enabled = threshold.has_value() || threshold_per_head.has_value();
  if (threshold) {
    if (!(*threshold >= 0)) invalid("threshold", "expected a number >= 0, got ", *threshold);
    problem.threshold.value = static_cast<float>(*threshold);
  }
  if (threshold_per_head) {
    if (threshold) invalid("threshold", "give one number or a tensor, not both");
    check_dim("threshold", *threshold_per_head, 2, "[batch, query heads]");
    check_dtype("threshold", *threshold_per_head, ScalarType::Float);
    check_same_device("threshold", *threshold_per_head, q);
    check_size("threshold", *threshold_per_head, 0, problem.batch, "batch");
    check_size("threshold", *threshold_per_head, 1, problem.num_heads, "query heads");
    problem.threshold.per_head = threshold_per_head->const_data_ptr<float>();
    problem.threshold.stride_batch = threshold_per_head->stride(0);
    problem.threshold.stride_head = threshold_per_head->stride(1);
  }

  const Tensor out = allocate_out(q, varlen);
  const int32_t float_dtype = aoti_torch_dtype_float32();
  const Tensor lse =
      varlen ? empty({problem.seqlen_q, problem.num_heads}, float_dtype, q)
             : empty({problem.batch, problem.num_heads, problem.seqlen_q}, float_dtype, q);
  const Tensor counters = problem.threshold.enabled ? empty({problem.batch, problem.num_heads, 2},
                                                            aoti_torch_dtype_int64(), q)
                                                    : empty({0}, aoti_torch_dtype_int64(), q);
  problem.q = head_tensor(q, varlen);
  problem.k = head_tensor(k, varlen);
  problem.v = head_tensor(v, varlen);
  problem.out = head_tensor(out, varlen);
  problem.lse = row_tensor(lse, varlen);
  if (problem.threshold.enabled) problem.threshold.counters = counters.mutable_data_ptr<int64_t>();
  run<AttendProblem>(q, problem, cpu::attend, cuda::attend);
  return {out, lse, counters};
}

}  // namespace attnsieve::binding
