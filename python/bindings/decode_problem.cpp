#include "python/bindings/decode_problem.h"

#include "attnsieve/capability.h"
#include "python/bindings/layout.h"
#include "python/bindings/pages.h"
#include "python/bindings/rules.h"

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

}  // namespace

DecodeProblem decode_problem(const char* op, const Tensor& q, const Tensor& k_cache,
                             const Tensor& v_cache, const std::optional<Tensor>& block_table,
                             const std::optional<Tensor>& seq_lens,
                             const std::optional<Tensor>& sink,
                             const std::optional<Tensor>& k_scale,
                             const std::optional<Tensor>& v_scale, double softmax_scale,
                             bool causal) {
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
  if (!q.is_cuda()) require_supported(op, Backend::kCpu, problem.dtype, problem.head_dim);
  check_aligned_rows("q", q);
  check_aligned_rows("k_cache", k_cache);
  check_aligned_rows("v_cache", v_cache);
  const bool coded = problem.code != Code::kNone;
  problem.k_scale = head_scales("k_scale", k_scale, coded, problem.num_kv_heads, k_cache);
  problem.v_scale = head_scales("v_scale", v_scale, coded, problem.num_kv_heads, k_cache);
  problem.softmax_scale = checked_scale(softmax_scale);
  problem.causal = causal;
  problem.paged = paged_kv("k_cache", k_cache.size(0), k_cache.size(1), block_table, seq_lens,
                           problem.batch, q);
  problem.seqlen_k = paged ? problem.paged.capacity() : k_cache.size(2);
  problem.sink = head_sinks(sink, problem.num_heads, q);
  problem.q = head_tensor(q, kBatched);
  problem.k = head_tensor(k_cache, of_k);
  problem.v = head_tensor(v_cache, of_k);
  return problem;
}

std::tuple<Tensor, Tensor> decode_outputs(const Tensor& q, DecodeProblem* problem) {
  const Tensor out = allocate_out(q, false);
  const Tensor lse =
      empty({problem->batch, problem->num_heads, problem->seqlen_q}, aoti_torch_dtype_float32(), q);
  problem->out = head_tensor(out, kBatched);
  problem->lse = row_tensor(lse, false);
  return {out, lse};
}

}  // namespace attnsieve::binding
