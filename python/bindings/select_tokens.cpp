// select_topk and select_threshold.
#include <vector>

#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/ops.h"

namespace attnsieve::binding {
namespace {

int64_t check_count(const char* argument, int64_t value, int64_t least = 0) {
  if (value < least || value > INT32_MAX) {
    invalid(argument, "expected a number in [", least, ", 2**31), got ", value);
  }
  return value;
}

void set_scores(TokenSelectProblem* problem, const Tensor& scores) {
  if (scores.dim() != 3 && scores.dim() != 4) {
    invalid("scores", "expected [batch, lists, candidates] or [batch, rows, lists, candidates], ",
            "got shape ", shape_of(scores));
  }
  check_dtype("scores", scores, ScalarType::Float);
  check_last_contiguous("scores", scores);
  const int64_t lists = scores.dim() - 2;
  problem->scores = scores.const_data_ptr<float>();
  problem->batch = scores.size(0);
  problem->seqlen_q = scores.dim() == 4 ? scores.size(1) : 1;
  problem->num_lists = scores.size(lists);
  problem->columns = check_count("scores", scores.size(lists + 1));
  problem->scores_stride_batch = scores.stride(0);
  problem->scores_stride_row = scores.dim() == 4 ? scores.stride(1) : 0;
  problem->scores_stride_head = scores.stride(lists);
}

void set_lengths(TokenSelectProblem* problem, const Tensor& scores,
                 const std::optional<Tensor>& seq_lens, bool causal) {
  if (causal && scores.dim() != 4) {
    invalid("causal", "needs scores [batch, rows, lists, candidates], a list for every row, got ",
            shape_of(scores));
  }
  problem->causal = causal;
  if (!seq_lens) {
    if (causal) invalid("causal", "needs seq_lens");
    return;
  }
  check_dim("seq_lens", *seq_lens, 1, "[batch]");
  check_dtype("seq_lens", *seq_lens, ScalarType::Int);
  check_size("seq_lens", *seq_lens, 0, problem->batch, "batch");
  check_last_contiguous("seq_lens", *seq_lens);
  check_same_device("seq_lens", *seq_lens, scores);
  problem->pages.seq_lens = seq_lens->const_data_ptr<int32_t>();
}

void set_table(TokenSelectProblem* problem, const Tensor& scores,
               const std::optional<Tensor>& block_table, int64_t page_size, int64_t num_pages) {
  if (!block_table) return;
  check_dim("block_table", *block_table, 2, "[batch, max_pages]");
  check_dtype("block_table", *block_table, ScalarType::Int);
  check_size("block_table", *block_table, 0, problem->batch, "batch");
  check_last_contiguous("block_table", *block_table);
  check_same_device("block_table", *block_table, scores);
  PagedKv& pages = problem->pages;
  pages.block_table = block_table->const_data_ptr<int32_t>();
  pages.table_stride_batch = block_table->stride(0);
  pages.max_pages = static_cast<int32_t>(check_count("block_table", block_table->size(1)));
  pages.page_size = static_cast<int32_t>(check_count("table_page_size", page_size, 1));
  pages.num_pages = check_count("num_pages", num_pages);
  if (problem->page_size != 1 && problem->page_size != page_size) {
    invalid("page_size", "expected 1 or the table's ", page_size, ", got ", problem->page_size);
  }
  if (num_pages > INT32_MAX / page_size) {
    invalid("num_pages", "slots of ", num_pages, " pages of ", page_size, " do not fit in int32");
  }
}

struct Lists {
  Tensor indices;
  Tensor counts;
};

// Checks what both ops share and allocates the lists.
Lists set_up(TokenSelectProblem* problem, const char* budget_name, const Tensor& scores,
             const std::optional<Tensor>& seq_lens, int64_t capacity, int64_t page_size,
             int64_t sink, int64_t recent, bool causal, const std::optional<Tensor>& block_table,
             int64_t table_page_size, int64_t num_pages) {
  set_scores(problem, scores);
  problem->capacity = static_cast<int32_t>(check_count(budget_name, capacity));
  problem->page_size = check_count("page_size", page_size, 1);
  problem->sink = check_count("sink", sink);
  problem->recent = check_count("recent", recent);
  if (sink + recent > capacity) {
    invalid("sink, recent", sink, " + ", recent, " forced entries do not fit in a budget of ",
            capacity);
  }
  set_lengths(problem, scores, seq_lens, causal);
  set_table(problem, scores, block_table, table_page_size, num_pages);
  std::vector<int64_t> sizes(scores.sizes().begin(), scores.sizes().end() - 1);
  const Tensor counts = empty(sizes, aoti_torch_dtype_int32(), scores);
  sizes.push_back(capacity);
  const Tensor indices = empty(sizes, aoti_torch_dtype_int32(), scores);
  problem->counts = counts.mutable_data_ptr<int32_t>();
  problem->indices = indices.mutable_data_ptr<int32_t>();
  return {indices, counts};
}

void run_select(TokenSelectProblem* problem, const Tensor& scores) {
  std::optional<Tensor> workspace;
  if (scores.is_cuda()) {
    const DeviceScope scope(scores);
    const size_t bytes = cuda::select_tokens_workspace_bytes(*problem);
    if (bytes > 0) {
      workspace = empty({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8(), scores);
      problem->workspace = workspace->mutable_data_ptr();
    }
  }
  run<TokenSelectProblem>(scores, *problem, cpu::select_tokens, cuda::select_tokens);
}

}  // namespace

std::tuple<Tensor, Tensor> select_topk(const Tensor& scores, const std::optional<Tensor>& seq_lens,
                                       int64_t k, int64_t page_size, int64_t sink, int64_t recent,
                                       bool causal, const std::optional<Tensor>& block_table,
                                       int64_t table_page_size, int64_t num_pages) {
  TokenSelectProblem problem;
  const Lists lists = set_up(&problem, "k", scores, seq_lens, k, page_size, sink, recent, causal,
                             block_table, table_page_size, num_pages);
  run_select(&problem, scores);
  return {lists.indices, lists.counts};
}

std::tuple<Tensor, Tensor, Tensor> select_threshold(
    const Tensor& scores, const std::optional<Tensor>& seq_lens, std::optional<double> threshold,
    const std::optional<Tensor>& threshold_per_head, int64_t capacity, int64_t page_size,
    int64_t sink, int64_t recent, bool causal, const std::optional<Tensor>& block_table,
    int64_t table_page_size, int64_t num_pages) {
  TokenSelectProblem problem;
  problem.rule = TokenRule::kThreshold;
  const Lists lists = set_up(&problem, "capacity", scores, seq_lens, capacity, page_size, sink,
                             recent, causal, block_table, table_page_size, num_pages);
  if (threshold.has_value() == threshold_per_head.has_value()) {
    invalid("threshold, threshold_per_head", "exactly one must be given");
  }
  problem.threshold.enabled = true;
  if (threshold) problem.threshold.value = static_cast<float>(*threshold);
  if (threshold_per_head) {
    check_dim("threshold_per_head", *threshold_per_head, 2, "[batch, lists]");
    check_dtype("threshold_per_head", *threshold_per_head, ScalarType::Float);
    check_size("threshold_per_head", *threshold_per_head, 0, problem.batch, "batch");
    check_size("threshold_per_head", *threshold_per_head, 1, problem.num_lists, "lists");
    check_same_device("threshold_per_head", *threshold_per_head, scores);
    problem.threshold.per_head = threshold_per_head->const_data_ptr<float>();
    problem.threshold.stride_batch = threshold_per_head->stride(0);
    problem.threshold.stride_head = threshold_per_head->stride(1);
  }
  const std::vector<int64_t> sizes(scores.sizes().begin(), scores.sizes().end() - 1);
  const Tensor passed = empty(sizes, aoti_torch_dtype_int32(), scores);
  problem.passed = passed.mutable_data_ptr<int32_t>();
  run_select(&problem, scores);
  return {lists.indices, lists.counts, passed};
}

}  // namespace attnsieve::binding
