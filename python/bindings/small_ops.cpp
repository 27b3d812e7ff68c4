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

// The sizes of a problem over `rows`, [batch, heads, q blocks, ...].
SelectProblem select_problem(const char* name, const Tensor& rows, int64_t seqlen_q,
                             int64_t seqlen_k, int64_t block_q, int64_t block_k) {
  if (seqlen_q < 0) invalid("seqlen_q", "expected a number >= 0, got ", seqlen_q);
  if (seqlen_k < 0) invalid("seqlen_k", "expected a number >= 0, got ", seqlen_k);
  SelectProblem problem;
  problem.block_q = check_block("block_q", block_q);
  problem.block_k = check_block_k(block_k);
  problem.batch = rows.size(0);
  problem.num_heads = rows.size(1);
  problem.seqlen_q = seqlen_q;
  problem.seqlen_k = seqlen_k;
  check_size(name, rows, 2, problem.num_q_blocks(), "ceil(seqlen_q / block_q)");
  return problem;
}

void set_forced(SelectProblem* problem, int64_t sink_blocks, int64_t local_blocks, bool diagonal) {
  problem->sink_blocks = check_block_count("sink_blocks", sink_blocks);
  problem->local_blocks = check_block_count("local_blocks", local_blocks);
  problem->force_diagonal = diagonal;
}

std::tuple<Tensor, Tensor> select(const Tensor& on, SelectProblem& problem, int64_t capacity) {
  problem.capacity = static_cast<int32_t>(capacity);
  const std::vector<int64_t> rows = {problem.batch, problem.num_heads, problem.num_q_blocks()};
  const Tensor counts = empty(rows, aoti_torch_dtype_int32(), on);
  const Tensor columns =
      empty({rows[0], rows[1], rows[2], problem.capacity}, aoti_torch_dtype_int32(), on);
  problem.counts = counts.mutable_data_ptr<int32_t>();
  problem.columns = columns.mutable_data_ptr<int32_t>();
  run<SelectProblem>(on, problem, cpu::select_blocks, cuda::select_blocks);
  return {counts, columns};
}

}  // namespace

std::tuple<Tensor, Tensor> select_blocks(const Tensor& scores, int64_t seqlen_q, int64_t seqlen_k,
                                         int64_t block_q, int64_t block_k,
                                         std::optional<int64_t> topk,
                                         std::optional<double> fraction,
                                         std::optional<double> top_p, int64_t min_blocks,
                                         int64_t sink_blocks, int64_t local_blocks, bool diagonal,
                                         bool causal, int64_t window_left, int64_t window_right) {
  check_dim("scores", scores, 4, "[batch, heads, q blocks, kv blocks]");
  check_dtype("scores", scores, ScalarType::Float);
  check_last_contiguous("scores", scores);
  SelectProblem problem = select_problem("scores", scores, seqlen_q, seqlen_k, block_q, block_k);
  check_size("scores", scores, 3, problem.num_k_blocks(), "ceil(seqlen_k / block_k)");
  problem.mask = make_mask(causal, window_left, window_right);
  problem.min_blocks = check_block_count("min_blocks", min_blocks);
  set_forced(&problem, sink_blocks, local_blocks, diagonal);
  set_rule(&problem, topk, fraction, top_p);
  problem.scores = scores.const_data_ptr<float>();
  problem.scores_stride_batch = scores.stride(0);
  problem.scores_stride_head = scores.stride(1);
  problem.scores_stride_row = scores.stride(2);
  return select(scores, problem, capacity_of(problem));
}

std::tuple<Tensor, Tensor> select_marked(const Tensor& bits,
                                         const std::optional<Tensor>& cu_seqlens_q,
                                         const std::optional<Tensor>& cu_seqlens_k,
                                         int64_t seqlen_q, int64_t seqlen_k, int64_t block_q,
                                         int64_t block_k, std::optional<int64_t> capacity,
                                         int64_t sink_blocks, int64_t local_blocks, bool diagonal,
                                         bool causal, int64_t window_left, int64_t window_right) {
  check_dim("bits", bits, 4, "[batch, heads, q blocks, words]");
  check_dtype("bits", bits, ScalarType::Int);
  if (!bits.is_contiguous()) invalid("bits", "must be contiguous");
  SelectProblem problem = select_problem("bits", bits, seqlen_q, seqlen_k, block_q, block_k);
  check_size("bits", bits, 3, problem.num_mark_words(), "ceil(kv blocks / 32)");
  if (cu_seqlens_q.has_value() != cu_seqlens_k.has_value())
    invalid(cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q", "both must be given, or neither");
  if (cu_seqlens_q) {
    check_cu_seqlens("cu_seqlens_q", *cu_seqlens_q, bits);
    check_cu_seqlens("cu_seqlens_k", *cu_seqlens_k, bits);
    check_size("cu_seqlens_q", *cu_seqlens_q, 0, problem.batch + 1, "batch + 1");
    check_size("cu_seqlens_k", *cu_seqlens_k, 0, problem.batch + 1, "batch + 1");
    problem.varlen = {cu_seqlens_q->const_data_ptr<int32_t>(),
                      cu_seqlens_k->const_data_ptr<int32_t>()};
  }
  if (capacity && *capacity < 0) invalid("capacity", "expected a number >= 0, got ", *capacity);
  problem.mask = make_mask(causal, window_left, window_right);
  set_forced(&problem, sink_blocks, local_blocks, diagonal);
  problem.rule = SelectRule::kMarked;
  problem.marks = reinterpret_cast<const uint32_t*>(bits.const_data_ptr<int32_t>());
  const int64_t all = problem.num_k_blocks();
  return select(bits, problem, capacity ? std::min(*capacity, all) : all);
}

}  // namespace attnsieve::binding
