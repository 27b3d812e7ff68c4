// cpu::proxy_scores: a score for every key or page of a cache.
//
// An item is a range of units of one sequence, with the query heads that share a key head and an
// output head. Its units are scored a chunk at a time: query vectors are the columns of the
// transposed tiles of kernels.h, units their rows, and the reductions follow in the order of the
// problem. A softmax needs its maximum and sum first: they come from a sweep of their own over the
// same scores, so no buffer grows with the cache. One thread computes a score, always in the same
// order, so results depend on neither neighbours nor threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "attnsieve/capability.h"
#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"
#include "cpu/projection.h"
#include "cpu/proxy_chunk.h"
#include "kernels.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Maximum and 1 / sum of the exponentials per [batch, output row, query head].
struct SoftmaxTotals {
  std::vector<float> max, factor;
};

class Sequence {
 public:
  Sequence(const ProxyScoresProblem& problem, const ProxyPlan& plan, const Kernels& kernels,
           int64_t batch, ProxyScratch& scratch)
      : problem_(problem),
        plan_(plan),
        kernels_(kernels),
        scratch_(scratch),
        batch_(batch),
        chunk_(problem, plan, kernels, batch, scratch) {
    rows_reduced_ = problem.row_reduce != Reduction::kNone;
    out_heads_ = plan.span / plan.heads_per_out;
  }

  // Sweeps over all units for query heads of one key head and a block of rows.
  void sum_exponentials(int64_t head, int heads, int64_t row, SoftmaxTotals* totals) {
    const int rows = rows_from(row);
    const int columns = heads * (rows_reduced_ ? 1 : rows);
    double sum[kColumns] = {};
    std::fill_n(scratch_.row_max, kColumns, -kInfinity);
    for (int64_t unit = 0; unit < problem_.units;) {
      unit = chunk_.collect(unit, problem_.units);
      chunk_.score(head, heads, row, rows);
      for (int first = 0; first < chunk_.count(); first += kUnitKeys) {
        std::fill_n(scratch_.row_sum, kColumns, 0.0f);
        exponentials(first, columns);
        for (int c = 0; c < columns; ++c)
          sum[c] = sum[c] * scratch_.rescale[c] + scratch_.row_sum[c];
      }
    }
    for (int c = 0; c < columns; ++c) {
      const int64_t at = total_of(head, heads, row, c);
      const float max = scratch_.row_max[c];
      totals->max[at] = max;
      totals->factor[at] = max == -kInfinity ? 0.0f : static_cast<float>(1.0 / sum[c]);
    }
  }

  // Writes the scores of units [unit, end) for the query heads of a span and a block of rows.
  void write(int64_t unit, int64_t end, int64_t span, int64_t row, const SoftmaxTotals& totals) {
    const int rows = rows_from(row);
    out_row_ = rows_reduced_ ? 0 : row;
    out_rows_ = rows_reduced_ ? 1 : rows;
    first_head_ = span * plan_.span;
    clear(unit, end);
    page_ = -1;
    while (unit < end) {
      unit = chunk_.collect(unit, end);
      if (chunk_.count() == 0) continue;
      for (int64_t head = first_head_; head < first_head_ + plan_.span;) {
        const int64_t left = plan_.heads_per_key - head % plan_.heads_per_key;
        const int heads = static_cast<int>(min64(plan_.pass_heads, left));
        chunk_.score(head, heads, row, rows);
        if (problem_.softmax) normalize(head, heads, row, totals);
        for (int i = 0; i < chunk_.count(); ++i) reduce_heads(i, head, heads);
        head += heads;
      }
      if (problem_.page_reduce == Reduction::kNone) {
        store();
      } else {
        for (int i = 0; i < chunk_.count(); ++i) add_to_page(i);
      }
    }
    close_page();
  }

 private:
  int rows_from(int64_t row) const {
    return static_cast<int>(min64(plan_.item_rows, problem_.num_rows - row));
  }

  int64_t total_of(int64_t head, int heads, int64_t row, int column) const {
    const int64_t out_row = rows_reduced_ ? 0 : row + column / heads;
    return (batch_ * plan_.out_rows + out_row) * problem_.num_heads + head + column % heads;
  }

  // exp(score - row_max) of up to kUnitKeys units; raises row_max.
  void exponentials(int first, int columns) {
    const int units = std::min(kUnitKeys, chunk_.count() - first);
    kernels_.softmax(scratch_.rows + first * kColumns, units, padded(columns, kernels_),
                     scratch_.row_max, scratch_.row_sum, scratch_.rescale);
  }

  void normalize(int64_t head, int heads, int64_t row, const SoftmaxTotals& totals) {
    const int columns = heads * out_rows_;
    for (int c = 0; c < columns; ++c)
      scratch_.row_max[c] = totals.max[total_of(head, heads, row, c)];
    for (int first = 0; first < chunk_.count(); first += kUnitKeys) exponentials(first, columns);
    for (int c = 0; c < columns; ++c) {
      const float factor = totals.factor[total_of(head, heads, row, c)];
      for (int i = 0; i < chunk_.count(); ++i) scratch_.rows[i * kColumns + c] *= factor;
    }
  }

  // Adds query heads to their output heads; the last of a group finishes it.
  void reduce_heads(int i, int64_t head, int heads) {
    const int64_t group = plan_.heads_per_out;
    const float* from = scratch_.rows + i * kColumns;
    for (int row = 0; row < out_rows_; ++row) {
      float* const to = scratch_.heads + i * plan_.out_columns + row * out_heads_;
      for (int64_t h = head; h < head + heads;) {
        float& out = to[(h - first_head_) / group];
        const bool starts = h % group == 0;
        const int64_t last = min64(head + heads, (h / group + 1) * group);
        double sum = *from++;
        if (!starts) sum = combine(problem_.head_reduce, out, sum);
        while (++h < last) sum = combine(problem_.head_reduce, sum, *from++);
        const bool mean = problem_.head_reduce == Reduction::kMean && h % group == 0;
        out = static_cast<float>(mean ? sum / static_cast<double>(group) : sum);
      }
    }
  }

  float* line_of(int row, int64_t out_head) const {
    const int64_t head = first_head_ / plan_.heads_per_out + out_head;
    const int64_t line = (batch_ * plan_.out_rows + out_row_ + row) * problem_.num_out_heads + head;
    return problem_.scores + line * problem_.columns();
  }

  void clear(int64_t unit, int64_t end) {
    const int64_t page = problem_.units_per_column();
    const int64_t first = unit / page;
    const int64_t last = (end + page - 1) / page;
    for (int row = 0; row < out_rows_; ++row)
      for (int64_t h = 0; h < out_heads_; ++h)
        std::fill(line_of(row, h) + first, line_of(row, h) + last, -kInfinity);
  }

  void store() {
    for (int row = 0; row < out_rows_; ++row) {
      for (int64_t h = 0; h < out_heads_; ++h) {
        float* const to = line_of(row, h);
        const float* const from = scratch_.heads + row * out_heads_ + h;
        for (int i = 0; i < chunk_.count(); ++i)
          if (chunk_.sees(out_row_ + row, i)) to[chunk_.unit(i)] = from[i * plan_.out_columns];
      }
    }
  }

  void add_to_page(int i) {
    const int64_t page = chunk_.unit(i) / problem_.page_size;
    if (page != page_) {
      close_page();
      page_ = page;
      std::fill_n(scratch_.members, out_rows_, 0);
    }
    const float* from = scratch_.heads + i * plan_.out_columns;
    double* to = scratch_.page;
    for (int row = 0; row < out_rows_; ++row, from += out_heads_, to += out_heads_) {
      if (!chunk_.sees(out_row_ + row, i)) continue;
      const bool first = scratch_.members[row]++ == 0;
      for (int64_t h = 0; h < out_heads_; ++h)
        to[h] = first ? from[h] : combine(problem_.page_reduce, to[h], from[h]);
    }
  }

  void close_page() {
    if (page_ < 0) return;
    const bool mean = problem_.page_reduce == Reduction::kMean;
    for (int row = 0; row < out_rows_; ++row) {
      if (scratch_.members[row] == 0) continue;
      const double divisor = mean ? static_cast<double>(scratch_.members[row]) : 1.0;
      for (int64_t h = 0; h < out_heads_; ++h)
        line_of(row, h)[page_] = static_cast<float>(scratch_.page[row * out_heads_ + h] / divisor);
    }
  }

  const ProxyScoresProblem& problem_;
  const ProxyPlan& plan_;
  const Kernels& kernels_;
  ProxyScratch& scratch_;
  int64_t batch_;
  ProxyChunk chunk_;
  bool rows_reduced_;
  int64_t out_heads_;  // of a span
  int64_t first_head_ = 0;
  int64_t out_row_ = 0;  // the first of `out_rows_` rows of the scores
  int out_rows_ = 0;
  int64_t page_ = -1;  // that scratch.page belongs to
};

// Runs body(sequence, rest) for [0, batch * per_batch), each with its thread's buffers.
template <class Body>
void for_each_item(const ProxyScoresProblem& problem, const ProxyPlan& plan, int64_t per_batch,
                   const ParallelFor& parallel_for, const Body& body) {
  const Kernels& widest = kernels();
  std::atomic<bool> out_of_memory{false};
  parallel_for(problem.batch * per_batch, [&](int64_t begin, int64_t end) {
    ProxyScratch scratch(plan);
    if (scratch.memory == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t flat = begin; flat < end; ++flat) {
      Sequence sequence(problem, plan, widest, flat / per_batch, scratch);
      body(sequence, flat % per_batch);
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

SoftmaxTotals softmax_totals(const ProxyScoresProblem& problem, const ProxyPlan& plan,
                             const ParallelFor& parallel_for) {
  SoftmaxTotals totals;
  totals.max.resize(problem.batch * plan.out_rows * problem.num_heads);
  totals.factor.resize(totals.max.size());
  const int64_t per_key = (plan.heads_per_key + plan.pass_heads - 1) / plan.pass_heads;
  const int64_t head_blocks = problem.num_key_heads * per_key;
  for_each_item(problem, plan, plan.row_blocks * head_blocks, parallel_for,
                [&](Sequence& sequence, int64_t item) {
                  const int64_t block = item % head_blocks;
                  const int64_t first = block % per_key * plan.pass_heads;
                  const int64_t heads = min64(plan.pass_heads, plan.heads_per_key - first);
                  sequence.sum_exponentials(block / per_key * plan.heads_per_key + first,
                                            static_cast<int>(heads),
                                            item / head_blocks * plan.item_rows, &totals);
                });
  return totals;
}

void check(const ProxyScoresProblem& problem) {
  require_supported("proxy_scores", Backend::kCpu, problem.dtype, problem.head_dim);
  for (const int64_t heads : {problem.num_key_heads, problem.num_out_heads})
    if (heads <= 0 || problem.num_heads % heads != 0)
      throw InvalidArgument("proxy_scores: the query heads must be a multiple of the others");
  if (problem.head_reduce == Reduction::kNone && problem.num_out_heads != problem.num_heads)
    throw InvalidArgument("proxy_scores: fewer heads need a reduction");
  if (problem.page_size <= 0) throw InvalidArgument("proxy_scores: page_size must be positive");
  if (problem.element == ProxyElement::kBounds && problem.page_reduce != Reduction::kNone)
    throw InvalidArgument("proxy_scores: bounds are pages already");
  if (problem.skip_first < 0 || problem.skip_last < 0)
    throw InvalidArgument("proxy_scores: skip_first and skip_last must not be negative");
  if (problem.projection.data != nullptr) {
    require_supported("proxy_scores", Backend::kCpu, problem.dtype, problem.query_dim);
    if (problem.num_projections <= 0 || problem.num_heads % problem.num_projections != 0)
      throw InvalidArgument("proxy_scores: the query heads must be a multiple of the projections");
  }
}

}  // namespace

void proxy_scores(const ProxyScoresProblem& problem, const ParallelFor& parallel_for) {
  check(problem);
  if (problem.num_rows == 0 && problem.row_reduce != Reduction::kNone) {
    const int64_t lines = problem.batch * problem.num_out_heads;
    std::fill_n(problem.scores, lines * problem.columns(), -kInfinity);
  }
  if (problem.batch == 0 || problem.num_rows == 0 || problem.units == 0) return;
  if (problem.projection.data != nullptr) {
    std::vector<char> projected;
    return proxy_scores(project_queries(problem, parallel_for, &projected), parallel_for);
  }
  const ProxyPlan plan(problem);
  SoftmaxTotals totals;
  if (problem.softmax) totals = softmax_totals(problem, plan, parallel_for);
  const int64_t per_row_block = plan.spans * plan.ranges;
  for_each_item(problem, plan, plan.row_blocks * per_row_block, parallel_for,
                [&](Sequence& sequence, int64_t item) {
                  const int64_t unit = item % plan.ranges * plan.item_units;
                  sequence.write(unit, min64(unit + plan.item_units, problem.units),
                                 item / plan.ranges % plan.spans,
                                 item / per_row_block * plan.item_rows, totals);
                });
}

}  // namespace attnsieve::cpu
