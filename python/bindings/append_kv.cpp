// append_kv: checks, tensors -> AppendKvProblem.
#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/layout.h"
#include "python/bindings/ops.h"
#include "python/bindings/pages.h"

namespace attnsieve::binding {
namespace {

// Of a tensor that is written: no two elements share memory through a stride of 0.
void check_writable(const char* argument, const Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) == 0)
      invalid(argument, "is written, but repeats memory along dimension ", dim, " (expanded?)");
  }
}

void check_rows(const AppendKvProblem& problem, const Tensor& k, const Tensor& v, bool packed) {
  const char* const shape =
      packed ? "[tokens, kv heads, head_dim]" : "[batch, kv heads, rows, head_dim]";
  for (const auto& [name, rows] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_dim(name, rows, packed ? 3 : 4, shape);
    check_same_device(name, rows, k);
    check_dtype(name, rows, k.scalar_type());
    for (int64_t dim = 0; dim < k.dim(); ++dim) check_size(name, rows, dim, k.size(dim), "as k");
    check_aligned_rows(name, rows);
  }
  if (problem.num_kv_heads == 0) invalid("k", "needs at least one head, got shape ", shape_of(k));
}

void set_caches(AppendKvProblem* problem, const Tensor& k, const Tensor& k_cache,
                const Tensor& v_cache, const std::optional<Tensor>& k_scale,
                const std::optional<Tensor>& v_scale, bool paged) {
  const char* const shape =
      paged ? "[pages, page_size, kv heads, head_dim]" : "[batch, kv heads, capacity, head_dim]";
  const Dims dims = paged ? kPaged : kBatched;
  problem->code = cache_code("k_cache", k_cache, k, false);
  const bool is_float8 = problem->code != Code::kNone;
  for (const auto& [name, cache] :
       {std::pair<const char*, const Tensor&>{"k_cache", k_cache}, {"v_cache", v_cache}}) {
    check_dim(name, cache, 4, shape);
    check_same_device(name, cache, k);
    check_dtype(name, cache, k_cache.scalar_type());
    check_size(name, cache, dims.head, problem->num_kv_heads, "heads of k");
    check_size(name, cache, dims.last, problem->head_dim, "head_dim of k");
    if (!paged) check_size(name, cache, 0, problem->batch, "batch");
    for (int64_t dim = 0; dim < 2; ++dim)
      check_size(name, cache, dim, k_cache.size(dim), "as k_cache");
    check_size(name, cache, dims.row, k_cache.size(dims.row), "as k_cache");
    is_float8 ? check_last_contiguous(name, cache) : check_aligned_rows(name, cache);
    check_writable(name, cache);
  }
  problem->k_cache = head_tensor(k_cache, dims);
  problem->v_cache = head_tensor(v_cache, dims);
  problem->k_scale = head_scales("k_scale", k_scale, is_float8, problem->num_kv_heads, k_cache);
  problem->v_scale = head_scales("v_scale", v_scale, is_float8, problem->num_kv_heads, k_cache);
}

void set_bounds(AppendKvProblem* problem, const Tensor& k, const std::optional<Tensor>& bounds,
                int64_t page_size, bool paged) {
  if (page_size <= 0 || page_size > INT32_MAX)
    invalid("bounds_page_size", "expected a number in [1, 2**31), got ", page_size);
  if (!bounds) {
    if (page_size != 1) invalid("bounds_page_size", "has no meaning without bounds");
    return;
  }
  if (paged && page_size != problem->pages.page_size) {
    invalid("bounds_page_size", "expected the cache's ", problem->pages.page_size, ", got ",
            page_size);
  }
  const int64_t head = paged ? 1 : 2;
  check_dim("bounds", *bounds, head + 3,
            paged ? "[pages, kv heads, 2, head_dim]" : "[batch, pages, kv heads, 2, head_dim]");
  check_same_device("bounds", *bounds, k);
  if (!paged) {
    check_size("bounds", *bounds, 0, problem->batch, "batch");
    check_size("bounds", *bounds, 1, (problem->seqlen_k + page_size - 1) / page_size,
               "pages of the cache");
  } else {
    check_size("bounds", *bounds, 0, problem->pages.num_pages, "pages of the cache");
  }
  check_size("bounds", *bounds, head, problem->num_kv_heads, "heads of k");
  check_size("bounds", *bounds, head + 1, 2, "minimum and maximum");
  check_size("bounds", *bounds, head + 2, problem->head_dim, "head_dim of k");
  problem->bounds_dtype = element_dtype("bounds", *bounds);
  if (problem->bounds_dtype != DType::kFloat32 && problem->code == Code::kNone)
    check_dtype("bounds", *bounds, k.scalar_type());  // others would round them
  check_aligned_rows("bounds", *bounds);
  check_writable("bounds", *bounds);
  problem->bounds = {bounds->mutable_data_ptr(), bounds->stride(0), bounds->stride(head),
                     paged ? 0 : bounds->stride(1)};
  problem->bounds_stride_bound = bounds->stride(head + 1);
  problem->bounds_page_size = page_size;
}

void set_proxy(AppendKvProblem* problem, const Tensor& k, const Tensor& k_cache,
               const std::optional<Tensor>& projection, const std::optional<Tensor>& proxy,
               bool paged) {
  if (projection.has_value() != proxy.has_value())
    invalid(proxy ? "projection" : "proxy", "projection and proxy must be given together");
  if (!proxy) return;
  check_dim("projection", *projection, 3, "[proxy heads, head_dim, proxy_dim]");
  check_same_device("projection", *projection, k);
  check_size("projection", *projection, 1, problem->head_dim, "head_dim of k");
  check_last_contiguous("projection", *projection);
  problem->projection_dtype = element_dtype("projection", *projection);
  problem->num_proxy_heads = projection->size(0);
  problem->proxy_dim = projection->size(2);
  if (problem->num_proxy_heads == 0 || problem->num_proxy_heads % problem->num_kv_heads != 0) {
    invalid("projection", "the number of heads must be a positive multiple of k's ",
            problem->num_kv_heads, ", got ", problem->num_proxy_heads);
  }
  const Dims dims = paged ? kPaged : kBatched;
  check_dim("proxy", *proxy, 4,
            paged ? "[pages, page_size, proxy heads, proxy_dim]"
                  : "[batch, proxy heads, capacity, proxy_dim]");
  check_same_device("proxy", *proxy, k);
  problem->proxy_dtype = element_dtype("proxy", *proxy);
  check_size("proxy", *proxy, 0, k_cache.size(0), "as k_cache");
  check_size("proxy", *proxy, dims.row, k_cache.size(dims.row), "as k_cache");
  check_size("proxy", *proxy, dims.head, problem->num_proxy_heads, "heads of projection");
  check_size("proxy", *proxy, dims.last, problem->proxy_dim, "columns of projection");
  if (!k.is_cuda())
    require_supported("append_kv", Backend::kCpu, problem->proxy_dtype, problem->proxy_dim);
  check_aligned_rows("proxy", *proxy);
  check_writable("proxy", *proxy);
  problem->projection = {const_cast<void*>(projection->const_data_ptr()), 0, projection->stride(0),
                         projection->stride(1)};
  problem->proxy = head_tensor(*proxy, dims);
}

}  // namespace

void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
               const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& k_scale,
               const std::optional<Tensor>& v_scale, const std::optional<Tensor>& bounds,
               int64_t bounds_page_size, const std::optional<Tensor>& projection,
               const std::optional<Tensor>& proxy) {
  const bool paged = block_table.has_value();
  const bool packed = cu_seqlens.has_value();
  if (!seq_lens) invalid("seq_lens", "must be given");
  check_dim("seq_lens", *seq_lens, 1, "[batch]");
  check_dim("k", k, packed ? 3 : 4,
            packed ? "[tokens, kv heads, head_dim]" : "[batch, kv heads, rows, head_dim]");
  AppendKvProblem problem;
  problem.batch = packed ? seq_lens->size(0) : k.size(0);
  problem.num_kv_heads = k.size(1);
  problem.seqlen_q = k.size(packed ? kVarlen.row : kBatched.row);
  problem.head_dim = k.size(k.dim() - 1);
  problem.dtype = element_dtype("k", k);
  check_rows(problem, k, v, packed);
  if (!k.is_cuda()) require_supported("append_kv", Backend::kCpu, problem.dtype, problem.head_dim);
  set_caches(&problem, k, k_cache, v_cache, k_scale, v_scale, paged);
  problem.pages = paged_kv("k_cache", k_cache.size(0), k_cache.size(1), block_table, seq_lens,
                           problem.batch, k);
  problem.seqlen_k = paged ? problem.pages.capacity() : k_cache.size(2);
  if (cu_seqlens) {
    check_dim("cu_seqlens", *cu_seqlens, 1, "[batch + 1]");
    check_dtype("cu_seqlens", *cu_seqlens, ScalarType::Int);
    check_size("cu_seqlens", *cu_seqlens, 0, problem.batch + 1, "batch + 1");
    check_last_contiguous("cu_seqlens", *cu_seqlens);
    check_same_device("cu_seqlens", *cu_seqlens, k);
    problem.cu_seqlens = cu_seqlens->const_data_ptr<int32_t>();
  }
  set_bounds(&problem, k, bounds, bounds_page_size, paged);
  set_proxy(&problem, k, k_cache, projection, proxy, paged);
  problem.k = head_tensor(k, packed ? kVarlen : kBatched);
  problem.v = head_tensor(v, packed ? kVarlen : kBatched);
  run<AppendKvProblem>(k, problem, cpu::append_kv, cuda::append_kv);
}

}  // namespace attnsieve::binding
