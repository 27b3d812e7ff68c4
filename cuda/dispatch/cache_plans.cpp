#include "cuda/dispatch/cache_plans.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "attnsieve/status.h"

namespace attnsieve::sm80 {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int counted(const char* what, int64_t count) {
  if (count > std::numeric_limits<int>::max()) {
    throw InvalidArgument("proxy_scores: the problem has " + std::to_string(count) + " " + what +
                          ", more than 32 bits count");
  }
  return static_cast<int>(count);
}

bool is_streamed(const ProxyScoresProblem& problem, const ProxyScoresPlan& plan) {
  return problem.dtype != DType::kFloat32 && problem.key_code == Code::kNone &&
         problem.key_scale.data == nullptr && problem.num_rows == 1 && !problem.softmax &&
         problem.page_reduce == Reduction::kNone && problem.head_dim <= kMaxStreamDim &&
         plan.heads_per_key <= kMaxStreamHeads &&
         (plan.heads_per_out == 1 || plan.heads_per_out == plan.heads_per_key);
}

void plan_stream(const ProxyScoresProblem& problem, int num_sms, ProxyScoresPlan* plan) {
  // A warp keeps its queries for several steps, and looks up the next one's places meanwhile. Longer
  // problems still get several waves of CTAs: the lengths of sequences differ, and only the device
  // knows them. On H200 1 to 16 steps differ by 3 % where there is work for all SMs, and 4 are the best
  // or close where there is not.
  // A CTA that projects its queries pays for that over more of them.
  const int64_t steps_of_warp = plan->projects ? 16 : 4;
  const int dim = static_cast<int>(problem.head_dim);
  plan->stream_dim = dim <= 32 ? 32 : dim <= 64 ? 64 : 128;
  const bool bounds = problem.element == ProxyElement::kBounds;
  plan->step_units = 16 * stream_tiles(plan->stream_dim, bounds);
  const int64_t sequence_steps = ceil_div(problem.units, plan->step_units);
  const int64_t all_steps = problem.batch * problem.num_key_heads * sequence_steps;
  const int64_t resident = int64_t{num_sms} * kStreamCtasPerSm * kStreamWarps;
  const int64_t wave = std::max<int64_t>(1, resident) * steps_of_warp;
  const int64_t waves = std::max<int64_t>(1, (all_steps + wave / 2) / wave);
  plan->steps =
      static_cast<int>(std::max<int64_t>(1, ceil_div(all_steps * steps_of_warp, waves * wave)));
  plan->stream_blocks =
      static_cast<int>(ceil_div(sequence_steps, int64_t{plan->steps} * kStreamWarps));
  plan->items = counted("work items", problem.batch * problem.num_key_heads * plan->stream_blocks);
}

}  // namespace

ProxyScoresPlan plan_proxy_scores(const ProxyScoresProblem& problem, int num_sms) {
  const bool rows_reduced = problem.row_reduce != Reduction::kNone;
  ProxyScoresPlan plan;
  // Kernels count units up to the end of a tile.
  counted("units", problem.units + kSoftmaxChunkUnits);
  plan.heads_per_key = static_cast<int>(problem.num_heads / problem.num_key_heads);
  plan.heads_per_out = static_cast<int>(problem.num_heads / problem.num_out_heads);
  plan.out_rows = counted("rows", rows_reduced ? 1 : problem.num_rows);
  plan.merged_rows = counted("rows", rows_reduced ? problem.num_rows : 1);
  plan.streamed = is_streamed(problem, plan);
  if (plan.streamed) {
    plan.projects =
        problem.projection.data != nullptr && problem.element != ProxyElement::kBounds &&
        problem.head_dim <= kMaxProjectedDim && problem.num_projections == problem.num_key_heads;
    plan_stream(problem, num_sms, &plan);
    return plan;
  }
  const int64_t page = problem.units_per_column();
  plan.lanes_per_column = 1;
  while (plan.lanes_per_column < page && plan.lanes_per_column < kScoreTileUnits)
    plan.lanes_per_column *= 2;
  plan.turns = static_cast<int>(ceil_div(page, plan.lanes_per_column));
  plan.columns = static_cast<int>(problem.columns());
  plan.column_blocks =
      static_cast<int>(ceil_div(plan.columns, kScoreTileUnits / plan.lanes_per_column));
  if (plan.turns == 1) {
    plan.group_rows = plan.out_rows;
    plan.group_heads = static_cast<int>(std::lcm<int64_t>(plan.heads_per_key, plan.heads_per_out));
  } else {  // the sum over a column's units in turns is kept for one output
    plan.group_rows = 1;
    plan.group_heads = plan.heads_per_out;
  }
  counted("query vectors", int64_t{plan.group_rows} * plan.group_heads * plan.merged_rows);
  plan.groups = counted("outputs", int64_t{plan.out_rows} / std::max(1, plan.group_rows) *
                                       (problem.num_heads / plan.group_heads));
  plan.items = counted("work items", problem.batch * plan.groups * plan.column_blocks);
  if (!problem.softmax) return plan;
  plan.chunks = static_cast<int>(ceil_div(problem.units, kSoftmaxChunkUnits));
  plan.total_heads = std::min(plan.heads_per_key, kScoreTileVectors);
  const int64_t blocks = problem.num_key_heads * ceil_div(plan.heads_per_key, plan.total_heads);
  plan.total_items = counted("work items", problem.batch * plan.out_rows * blocks * plan.chunks);
  return plan;
}

AppendKvPlan plan_append_kv(const AppendKvProblem& problem) {
  // Few enough rows for a step of decoding to be spread over the device, and enough of them for a
  // CTA of a long append to read the projection for.
  constexpr int64_t kLeastKeys = 16;
  const int64_t page = problem.bounds.data != nullptr ? problem.bounds_page_size : 1;
  AppendKvPlan plan;
  plan.segment_keys = static_cast<int>(
      std::min<int64_t>(std::numeric_limits<int>::max(), ceil_div(kLeastKeys, page) * page));
  int64_t segments = problem.seqlen_q / plan.segment_keys + 2 * problem.batch;
  if (problem.cu_seqlens == nullptr) {
    // Consecutive rows, wherever they begin in a segment.
    plan.segments = static_cast<int>(
        problem.seqlen_q == 0 ? 0 : ceil_div(problem.seqlen_q - 1, plan.segment_keys) + 1);
    segments = problem.batch * plan.segments;
  }
  plan.items = segments * problem.num_kv_heads;
  return plan;
}

}  // namespace attnsieve::sm80
