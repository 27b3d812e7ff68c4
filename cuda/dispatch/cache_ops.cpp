// proxy_scores and append_kv on CUDA: checks, the plan, one kernel of the element type.
#include "attnsieve/launch.h"
#include "cuda/dispatch/device.h"
#include "cuda/dispatch/instantiations.h"

namespace attnsieve::cuda {
namespace {

bool is_multiple(int64_t value, int64_t of) { return value % of == 0; }

bool has_scores(const ProxyScoresProblem& problem) {
  const bool rows = problem.num_rows > 0 || problem.row_reduce != Reduction::kNone;
  return problem.batch > 0 && rows && problem.units > 0;
}

// Rows of codes have no alignment of their own.
bool aligned_codes(const HeadTensor& rows, int64_t stride_bound) {
  constexpr int64_t kBytes = 8;
  return is_multiple(reinterpret_cast<intptr_t>(rows.data), kBytes) &&
         is_multiple(rows.stride_batch, kBytes) && is_multiple(rows.stride_head, kBytes) &&
         is_multiple(rows.stride_row, kBytes) && is_multiple(stride_bound, kBytes);
}

// Projected queries, where the kernels do not project themselves.
size_t projected_bytes(const ProxyScoresProblem& problem, const sm80::ProxyScoresPlan& plan) {
  if (problem.projection.data == nullptr || plan.projects) return 0;
  constexpr int64_t kAlignment = 16;
  const int64_t numbers = problem.batch * problem.num_heads * problem.num_rows * problem.head_dim;
  const int64_t bytes = numbers * (problem.dtype == DType::kFloat32 ? 4 : 2);
  return static_cast<size_t>((bytes + kAlignment - 1) / kAlignment * kAlignment);
}

size_t total_lines(const ProxyScoresProblem& problem, const sm80::ProxyScoresPlan& plan) {
  return static_cast<size_t>(problem.batch * plan.out_rows * problem.num_heads);
}

void check(const ProxyScoresProblem& problem) {
  require_supported("proxy_scores", Backend::kSm80, problem.dtype, problem.head_dim);
  for (const int64_t heads : {problem.num_key_heads, problem.num_out_heads}) {
    if (heads <= 0 || problem.num_heads % heads != 0)
      throw InvalidArgument("proxy_scores: the query heads must be a multiple of the others");
  }
  if (problem.head_reduce == Reduction::kNone && problem.num_out_heads != problem.num_heads)
    throw InvalidArgument("proxy_scores: fewer heads need a reduction");
  if (problem.page_size <= 0) throw InvalidArgument("proxy_scores: page_size must be positive");
  if (problem.element == ProxyElement::kBounds && problem.page_reduce != Reduction::kNone)
    throw InvalidArgument("proxy_scores: bounds are pages already");
  if (problem.skip_first < 0 || problem.skip_last < 0)
    throw InvalidArgument("proxy_scores: skip_first and skip_last must not be negative");
  if (problem.projection.data != nullptr) {
    require_supported("proxy_scores", Backend::kSm80, problem.dtype, problem.query_dim);
    if (problem.num_projections <= 0 || problem.num_heads % problem.num_projections != 0)
      throw InvalidArgument("proxy_scores: the query heads must be a multiple of the projections");
  }
}

void check(const AppendKvProblem& problem) {
  require_supported("append_kv", Backend::kSm80, problem.dtype, problem.head_dim);
  if (problem.pages.seq_lens == nullptr)
    throw InvalidArgument("append_kv: lengths after the append are needed");
  if (problem.code == Code::kInt8 || (problem.code == Code::kFloat8E4m3 &&
                                      (problem.k_scale == nullptr || problem.v_scale == nullptr)))
    throw InvalidArgument("append_kv: codes are float8_e4m3, with scales of k and v");
  if (problem.proxy.data != nullptr) {
    require_supported("append_kv", Backend::kSm80, problem.proxy_dtype, problem.proxy_dim);
    if (problem.num_proxy_heads % problem.num_kv_heads != 0)
      throw InvalidArgument("append_kv: the proxy heads must be a multiple of the KV heads");
  }
  const PagedKv& pages = problem.pages;
  if (problem.bounds.data != nullptr &&
      (problem.bounds_page_size <= 0 ||
       (pages.block_table != nullptr && problem.bounds_page_size != pages.page_size)))
    throw InvalidArgument("append_kv: bounds_page_size must be that of the cache");
}

}  // namespace

size_t proxy_scores_workspace_bytes(const ProxyScoresProblem& problem) {
  const bool projected = problem.projection.data != nullptr;
  if ((!problem.softmax && !projected) || !has_scores(problem)) return 0;
  check(problem);
  const auto plan = sm80::plan_proxy_scores(problem, dispatch_device().num_sms);
  const size_t totals = problem.softmax ? total_lines(problem, plan) * (plan.chunks + 1) : 0;
  return projected_bytes(problem, plan) + totals * sizeof(sm80::SoftmaxTotal);
}

void proxy_scores(const ProxyScoresProblem& problem, void* stream) {
  check(problem);
  if (!has_scores(problem)) return;
  sm80::ProxyScoresArguments arguments;
  arguments.problem = problem;
  arguments.plan = sm80::plan_proxy_scores(problem, dispatch_device().num_sms);
  arguments.aligned_codes = aligned_codes(problem.keys, problem.keys_stride_bound);
  const size_t projected = projected_bytes(problem, arguments.plan);
  if ((problem.softmax || projected > 0) && problem.workspace == nullptr)
    throw InvalidArgument("proxy_scores: a softmax and a projection need their workspace");
  if (projected > 0) arguments.projected = problem.workspace;
  if (problem.softmax) {
    auto* const totals = static_cast<unsigned char*>(problem.workspace) + projected;
    arguments.totals = reinterpret_cast<sm80::SoftmaxTotal*>(totals);
    arguments.chunk_totals = arguments.totals + total_lines(problem, arguments.plan);
  }
  switch (problem.dtype) {
    case DType::kFloat32: return sm80::launch_proxy_scores<float>(arguments, stream);
    case DType::kFloat16: return sm80::launch_proxy_scores<__half>(arguments, stream);
    case DType::kBFloat16: return sm80::launch_proxy_scores<__nv_bfloat16>(arguments, stream);
  }
}

void append_kv(const AppendKvProblem& problem, void* stream) {
  if (problem.batch == 0) return;
  check(problem);
  sm80::AppendKvArguments arguments;
  arguments.problem = problem;
  arguments.plan = sm80::plan_append_kv(problem);
  arguments.aligned_codes = aligned_codes(problem.k_cache, 0) && aligned_codes(problem.v_cache, 0);
  switch (problem.dtype) {
    case DType::kFloat32: return sm80::launch_append_kv<float>(arguments, stream);
    case DType::kFloat16: return sm80::launch_append_kv<__half>(arguments, stream);
    case DType::kBFloat16: return sm80::launch_append_kv<__nv_bfloat16>(arguments, stream);
  }
}

}  // namespace attnsieve::cuda
