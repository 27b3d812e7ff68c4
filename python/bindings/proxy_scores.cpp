// proxy_scores: checks, the scores, tensors -> ProxyScoresProblem.
#include <cmath>

#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/layout.h"
#include "python/bindings/ops.h"
#include "python/bindings/pages.h"

namespace attnsieve::binding {
namespace {

// The numbers of an enum of problem.h, as python/attnsieve/ops_cache.py counts them.
template <class Enum>
Enum choice(const char* argument, int64_t value, Enum last) {
  if (value < 0 || value > static_cast<int64_t>(last)) {
    invalid(argument, "expected a number in [0, ", static_cast<int64_t>(last), "], got ", value);
  }
  return static_cast<Enum>(value);
}

int64_t check_count(const char* argument, int64_t value, int64_t least) {
  if (value < least || value > INT32_MAX)
    invalid(argument, "expected a number in [", least, ", 2**31), got ", value);
  return value;
}

// Dimensions of keys; those that the layout lacks are -1.
struct KeyDims {
  int64_t unit, head, bound, count;
  const char* shape;
};

KeyDims key_dims(bool bounds, bool paged) {
  if (bounds && paged) return {-1, 1, 2, 4, "[pages, key heads, 2, head_dim]"};
  if (bounds) return {1, 2, 3, 5, "[batch, pages, key heads, 2, head_dim]"};
  if (paged) return {1, 2, -1, 4, "[pages, page_size, key heads, head_dim]"};
  return {2, 1, -1, 4, "[batch, key heads, tokens, head_dim]"};
}

void set_keys(ProxyScoresProblem* problem, const Tensor& q, const Tensor& keys,
              const std::optional<Tensor>& key_scale, const KeyDims& dims, bool paged) {
  check_dim("keys", keys, dims.count, dims.shape);
  check_same_device("keys", keys, q);
  problem->key_code = cache_code("keys", keys, q, true);
  check_size("keys", keys, dims.count - 1, problem->head_dim,
             problem->projection.data != nullptr ? "columns of projection" : "head_dim of q");
  if (!paged) check_size("keys", keys, 0, problem->batch, "batch of q");
  if (dims.bound >= 0) check_size("keys", keys, dims.bound, 2, "minimum and maximum");
  problem->num_key_heads = keys.size(dims.head);
  if (problem->num_key_heads == 0)
    invalid("keys", "needs at least one head, got shape ", shape_of(keys));
  if (problem->num_heads == 0 || problem->num_heads % problem->num_key_heads != 0) {
    invalid("q", "the number of heads must be a positive multiple of keys's ",
            problem->num_key_heads, ", got ", problem->num_heads);
  }
  if (problem->key_code == Code::kNone) {
    check_aligned_rows("keys", keys);
  } else {
    check_last_contiguous("keys", keys);
  }
  const auto stride = [](const Tensor& tensor, int64_t dim) {
    return dim < 0 ? 0 : tensor.stride(dim);
  };
  problem->keys = {const_cast<void*>(keys.const_data_ptr()), keys.stride(0),
                   stride(keys, dims.head), stride(keys, dims.unit)};
  problem->keys_stride_bound = stride(keys, dims.bound);
  if (!key_scale) {
    if (problem->key_code != Code::kNone)
      invalid("key_scale", "must be given with keys of dtype ", dtype_of(keys));
    return;
  }
  check_dim("key_scale", *key_scale, dims.count - 1, "as keys without head_dim");
  check_dtype("key_scale", *key_scale, ScalarType::Float);
  check_same_device("key_scale", *key_scale, q);
  for (int64_t dim = 0; dim + 1 < dims.count; ++dim)
    check_size("key_scale", *key_scale, dim, keys.size(dim), "as keys");
  problem->key_scale = {const_cast<float*>(key_scale->const_data_ptr<float>()),
                        key_scale->stride(0), stride(*key_scale, dims.head),
                        stride(*key_scale, dims.unit)};
  problem->key_scale_stride_bound = stride(*key_scale, dims.bound);
}

void set_projection(ProxyScoresProblem* problem, const Tensor& q, const Tensor& projection) {
  const int64_t dims = projection.dim();
  if (dims != 3 && dims != 4) {
    invalid("projection",
            "expected [heads, head_dim, proxy_dim] or [batch, heads, ...], got shape ",
            shape_of(projection));
  }
  check_same_device("projection", projection, q);
  check_dtype("projection", projection, q.scalar_type());
  if (dims == 4) check_size("projection", projection, 0, problem->batch, "batch of q");
  check_size("projection", projection, dims - 2, q.size(3), "head_dim of q");
  check_aligned_rows("projection", projection);
  problem->query_dim = q.size(3);
  problem->head_dim = projection.size(dims - 1);
  problem->num_projections = projection.size(dims - 3);
  if (problem->num_projections == 0 || problem->num_heads % problem->num_projections != 0) {
    invalid("projection", "the number of heads must divide q's ", problem->num_heads, ", got ",
            problem->num_projections);
  }
  problem->projection = {const_cast<void*>(projection.const_data_ptr()),
                         dims == 4 ? projection.stride(0) : 0, projection.stride(dims - 3),
                         projection.stride(dims - 2)};
}

void set_heads(ProxyScoresProblem* problem, const Tensor& q, int64_t num_out_heads,
               const std::optional<Tensor>& weights) {
  problem->num_out_heads = num_out_heads;
  if (num_out_heads <= 0 || problem->num_heads % num_out_heads != 0) {
    invalid("num_out_heads", "expected a divisor of q's ", problem->num_heads, " heads, got ",
            num_out_heads);
  }
  if (problem->head_reduce == Reduction::kNone && num_out_heads != problem->num_heads) {
    invalid("head_reduce", problem->num_heads, " heads cannot become ", num_out_heads,
            " without one");
  }
  if (!weights) return;
  const int64_t dims = weights->dim();
  if (dims < 1 || dims > 3) {
    invalid("head_weights", "expected [heads], [batch, heads] or [batch, heads, rows], got shape ",
            shape_of(*weights));
  }
  check_dtype("head_weights", *weights, ScalarType::Float);
  check_same_device("head_weights", *weights, q);
  if (dims > 1) check_size("head_weights", *weights, 0, problem->batch, "batch");
  check_size("head_weights", *weights, dims > 1 ? 1 : 0, problem->num_heads, "query heads");
  if (dims > 2) check_size("head_weights", *weights, 2, problem->num_rows, "rows of q");
  problem->head_weights = {const_cast<float*>(weights->const_data_ptr<float>()),
                           dims > 1 ? weights->stride(0) : 0, weights->stride(dims > 1 ? 1 : 0),
                           dims > 2 ? weights->stride(2) : 0};
}

void set_page_size(ProxyScoresProblem* problem, int64_t page_size) {
  const bool bounds = problem->element == ProxyElement::kBounds;
  const bool pooled = problem->page_reduce != Reduction::kNone;
  if (bounds && pooled) invalid("page_reduce", "bounds are pages already");
  problem->page_size = check_count("page_size", page_size, 1);
  if (!bounds && !pooled && page_size != 1)
    invalid("page_size", "has no meaning without page_reduce or bounds, got ", page_size);
}

}  // namespace

Tensor proxy_scores(const Tensor& q, const Tensor& keys, const std::optional<Tensor>& key_scale,
                    const std::optional<Tensor>& projection,
                    const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
                    int64_t element, int64_t row_reduce, bool softmax, int64_t head_reduce,
                    int64_t num_out_heads, const std::optional<Tensor>& head_weights,
                    int64_t page_reduce, int64_t page_size, int64_t skip_first, int64_t skip_last,
                    bool causal, double score_scale) {
  check_dim("q", q, 4, "[batch, heads, rows, head_dim]");
  ProxyScoresProblem problem;
  problem.batch = q.size(0);
  problem.num_heads = q.size(1);
  problem.num_rows = q.size(2);
  problem.head_dim = q.size(3);
  problem.dtype = element_dtype("q", q);
  if (projection) set_projection(&problem, q, *projection);
  problem.element = choice("element", element, ProxyElement::kBounds);
  problem.row_reduce = choice("row_reduce", row_reduce, Reduction::kSum);
  problem.head_reduce = choice("head_reduce", head_reduce, Reduction::kSum);
  problem.page_reduce = choice("page_reduce", page_reduce, Reduction::kSum);
  problem.softmax = softmax;
  problem.causal = causal;
  const bool paged = block_table.has_value();
  const bool bounds = problem.element == ProxyElement::kBounds;
  const KeyDims dims = key_dims(bounds, paged);
  set_keys(&problem, q, keys, key_scale, dims, paged);
  set_heads(&problem, q, num_out_heads, head_weights);
  if (!q.is_cuda())
    require_supported("proxy_scores", Backend::kCpu, problem.dtype, problem.head_dim);
  check_aligned_rows("q", q);
  set_page_size(&problem, page_size);
  problem.skip_first = check_count("skip_first", skip_first, 0);
  problem.skip_last = check_count("skip_last", skip_last, 0);
  problem.score_scale = static_cast<float>(score_scale);
  if (!(problem.score_scale > 0.0f) || std::isinf(problem.score_scale))
    invalid("score_scale", "expected a positive finite number, got ", score_scale);
  problem.pages = paged_kv("keys", keys.size(0), bounds ? page_size : keys.size(1), block_table,
                           seq_lens, problem.batch, q);
  if (paged && bounds) problem.pages.page_size = 1;
  problem.units = paged ? problem.pages.capacity() : keys.size(dims.unit);

  const bool rows_reduced = problem.row_reduce != Reduction::kNone;
  std::vector<int64_t> sizes = {problem.batch, problem.num_rows, num_out_heads, problem.columns()};
  if (rows_reduced) sizes.erase(sizes.begin() + 1);
  const Tensor scores = empty(sizes, aoti_torch_dtype_float32(), q);
  problem.q = head_tensor(q, kBatched);
  problem.scores = scores.mutable_data_ptr<float>();
  std::optional<Tensor> workspace;
  if (q.is_cuda()) {
    const DeviceScope scope(q);
    const size_t bytes = cuda::proxy_scores_workspace_bytes(problem);
    if (bytes > 0) {
      workspace = empty({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8(), q);
      problem.workspace = workspace->mutable_data_ptr();
    }
  }
  run<ProxyScoresProblem>(q, problem, cpu::proxy_scores, cuda::proxy_scores);
  return scores;
}

}  // namespace attnsieve::binding
