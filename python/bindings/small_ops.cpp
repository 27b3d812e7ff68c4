// merge_states and select_blocks.
#include <cmath>
#include <vector>

#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/ops.h"

namespace attnsieve::binding {

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses) {
  if (outs.dim() < 2)
    invalid("outs", "expected [states, ..., head_dim], got shape ", shape_of(outs));
  check_dim("lses", lses, outs.dim() - 1, "[states, ...] like outs without head_dim");
  check_dtype("lses", lses, ScalarType::Float);
  check_same_device("lses", lses, outs);
  for (int64_t i = 0; i + 1 < outs.dim(); ++i)
    check_size("lses", lses, i, outs.size(i), "size of outs");

  const Tensor outs_dense = outs.is_contiguous() ? outs : torch::stable::contiguous(outs);
  const Tensor lses_dense = lses.is_contiguous() ? lses : torch::stable::contiguous(lses);
  const int64_t head_dim = outs.size(outs.dim() - 1);
  std::vector<int64_t> sizes(outs.sizes().begin() + 1, outs.sizes().end());
  const Tensor out = empty(sizes, raw_dtype(outs), outs);
  sizes.pop_back();
  const Tensor lse = empty(sizes, aoti_torch_dtype_float32(), outs);

  MergeProblem problem;
  problem.outs = outs_dense.const_data_ptr();
  problem.lses = lses_dense.const_data_ptr<float>();
  problem.out = out.mutable_data_ptr();
  problem.lse = lse.mutable_data_ptr<float>();
  problem.num_states = outs.size(0);
  problem.rows = lse.numel();
  problem.head_dim = head_dim;
  problem.dtype = element_dtype("outs", outs);
  require_supported("merge_states", outs.is_cuda() ? Backend::kSm80 : Backend::kCpu, problem.dtype,
                    head_dim);
  run<MergeProblem>(outs, problem, cpu::merge_states, cuda::merge_states);
  return {out, lse};
}

namespace {

void set_rule(SelectProblem* problem, std::optional<int64_t> topk, std::optional<double> fraction,
              std::optional<double> top_p) {
  if (topk.has_value() + fraction.has_value() + top_p.has_value() != 1) {
    invalid("topk, fraction, top_p", "exactly one must be given");
  }
  if (topk) {
    if (*topk < 0) invalid("topk", "expected a number >= 0, got ", *topk);
    problem->rule = SelectRule::kTopK;
    problem->topk = static_cast<int32_t>(std::min<int64_t>(*topk, problem->num_k_blocks()));
  } else if (fraction) {
    if (!(*fraction >= 0 && *fraction <= 1))
      invalid("fraction", "expected a number in [0, 1], got ", *fraction);
    problem->rule = SelectRule::kFraction;
    problem->fraction = *fraction;
  } else {
    if (!(*top_p >= 0 && *top_p <= 1))
      invalid("top_p", "expected a number in [0, 1], got ", *top_p);
    problem->rule = SelectRule::kTopP;
    problem->top_p = *top_p;
  }
}

int32_t check_block_count(const char* argument, int64_t blocks) {
  if (blocks < 0 || blocks > INT32_MAX) invalid(argument, "expected a number >= 0, got ", blocks);
  return static_cast<int32_t>(blocks);
}

// Most blocks a row can keep under the rule. python/attnsieve/_fake.py repeats this.
int64_t capacity_of(const SelectProblem& problem) {
  const int64_t num_k_blocks = problem.num_k_blocks();
  const int64_t diagonal = problem.block_q / problem.block_k + 2;
  const int64_t forced =
      static_cast<int64_t>(problem.sink_blocks) + problem.local_blocks + diagonal;
  int64_t kept = num_k_blocks;
  if (problem.rule == SelectRule::kTopK) kept = problem.topk;
  if (problem.rule == SelectRule::kFraction) {
    kept = std::max<int64_t>(
        problem.min_blocks,
        static_cast<int64_t>(std::ceil(problem.fraction * static_cast<double>(num_k_blocks))));
  }
  return std::min(num_k_blocks, std::max(kept, forced));
}

}  // namespace

std::tuple<Tensor, Tensor> select_blocks(const Tensor& scores, int64_t seqlen_q, int64_t seqlen_k,
                                         int64_t block_q, int64_t block_k,
                                         std::optional<int64_t> topk,
                                         std::optional<double> fraction,
                                         std::optional<double> top_p, int64_t min_blocks,
                                         int64_t sink_blocks, int64_t local_blocks, bool diagonal,
                                         bool causal, int64_t window_left, int64_t window_right) {
  SelectProblem problem;
  check_dim("scores", scores, 4, "[batch, heads, q blocks, kv blocks]");
  check_dtype("scores", scores, ScalarType::Float);
  check_last_contiguous("scores", scores);
  if (seqlen_q < 0) invalid("seqlen_q", "expected a number >= 0, got ", seqlen_q);
  if (seqlen_k < 0) invalid("seqlen_k", "expected a number >= 0, got ", seqlen_k);
  problem.block_q = check_block("block_q", block_q);
  problem.block_k = check_block_k(block_k);
  problem.batch = scores.size(0);
  problem.num_heads = scores.size(1);
  problem.seqlen_q = seqlen_q;
  problem.seqlen_k = seqlen_k;
  check_size("scores", scores, 2, problem.num_q_blocks(), "ceil(seqlen_q / block_q)");
  check_size("scores", scores, 3, problem.num_k_blocks(), "ceil(seqlen_k / block_k)");
  problem.mask = make_mask(causal, window_left, window_right);
  problem.min_blocks = check_block_count("min_blocks", min_blocks);
  problem.sink_blocks = check_block_count("sink_blocks", sink_blocks);
  problem.local_blocks = check_block_count("local_blocks", local_blocks);
  problem.force_diagonal = diagonal;
  set_rule(&problem, topk, fraction, top_p);
  problem.capacity = static_cast<int32_t>(capacity_of(problem));

  const int32_t int_dtype = aoti_torch_dtype_int32();
  const Tensor counts =
      empty({problem.batch, problem.num_heads, problem.num_q_blocks()}, int_dtype, scores);
  const Tensor columns =
      empty({problem.batch, problem.num_heads, problem.num_q_blocks(), problem.capacity}, int_dtype,
            scores);
  problem.scores = scores.const_data_ptr<float>();
  problem.scores_stride_batch = scores.stride(0);
  problem.scores_stride_head = scores.stride(1);
  problem.scores_stride_row = scores.stride(2);
  problem.counts = counts.mutable_data_ptr<int32_t>();
  problem.columns = columns.mutable_data_ptr<int32_t>();
  run<SelectProblem>(scores, problem, cpu::select_blocks, cuda::select_blocks);
  return {counts, columns};
}

}  // namespace attnsieve::binding
