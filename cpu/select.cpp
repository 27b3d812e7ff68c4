// cpu::select_blocks: rows of block scores -> BlockIndex, by exact top-k or top-p.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"
#include "cpu/score_order.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kMassOne =
    4294967296.0;  // 2^32: softmax mass is counted in integers, so its sum has no order

bool contains(KeyRange range, int64_t block) { return block >= range.begin && block < range.end; }

// Which blocks one row of q-blocks may and must keep.
struct RowRules {
  KeyRange visible;
  KeyRange sink;
  KeyRange diagonal;
  KeyRange local;

  bool forced(int64_t block) const {
    return contains(sink, block) || contains(diagonal, block) || contains(local, block);
  }
};

RowRules rules_of(const SelectProblem& problem, int64_t batch, int64_t row) {
  const Seqlens lengths = seqlens_of(problem, batch);
  const int64_t row_begin = row * problem.block_q;
  const int64_t row_end = min64(row_begin + problem.block_q, lengths.q);
  const KeyRange keys = visible_keys(problem.mask, row_begin, row_end, lengths.q, lengths.k);
  RowRules rules{{0, 0}, {0, problem.sink_blocks}, {0, 0}, {0, 0}};
  if (keys.begin < keys.end) {
    rules.visible = {keys.begin / problem.block_k,
                     (keys.end + problem.block_k - 1) / problem.block_k};
  }
  const KeyRange diagonal =
      diagonal_blocks(row, problem.block_q, problem.block_k, lengths.q, lengths.k);
  if (problem.force_diagonal) rules.diagonal = diagonal;
  if (diagonal.begin < diagonal.end)
    rules.local = {diagonal.begin - problem.local_blocks, diagonal.begin};
  return rules;
}

// One candidate as an integer that sorts the way the ranking does: forced blocks first, then higher
// scores (NaN below -inf), then smaller indices. No two are equal: every sort gives one order.
struct Candidate {
  uint64_t rank;   // larger is better
  int32_t block;

  bool operator<(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : block < other.block;
  }
};

uint64_t rank_of(float score, bool forced) { return (uint64_t{forced} << 32) | score_order(score); }

uint64_t mass_of(float score, float max) {
  if (std::isnan(score) || max == -kInfinity) return 0;
  if (max == kInfinity) return score == kInfinity ? static_cast<uint64_t>(kMassOne) : 0;
  return static_cast<uint64_t>(std::llround(std::exp(static_cast<double>(score - max)) * kMassOne));
}

// How many of the best candidates reach the mass. `candidates` must be sorted.
int64_t count_for_mass(const SelectProblem& problem, const std::vector<Candidate>& candidates,
                       const float* scores, int64_t forced) {
  float max = -kInfinity;
  for (const Candidate& c : candidates) {
    if (scores[c.block] > max) max = scores[c.block];
  }
  uint64_t total = 0;
  for (const Candidate& c : candidates) total += mass_of(scores[c.block], max);
  const double target = std::ceil(problem.top_p * static_cast<double>(total));
  uint64_t mass = 0;
  int64_t count = 0;
  for (const Candidate& c : candidates) {
    if (count >= forced && count >= problem.min_blocks && static_cast<double>(mass) >= target)
      break;
    mass += mass_of(scores[c.block], max);
    ++count;
  }
  return count;
}

// Blocks that the row keeps; moves them to the front of `candidates`.
int64_t keep_best(const SelectProblem& problem, std::vector<Candidate>& candidates,
                  const float* scores, int64_t forced) {
  const int64_t visible = static_cast<int64_t>(candidates.size());
  if (problem.rule == SelectRule::kTopP) {
    std::sort(candidates.begin(), candidates.end());
    return count_for_mass(problem, candidates, scores, forced);
  }
  int64_t budget = problem.topk;
  if (problem.rule == SelectRule::kFraction) {
    const double wanted = std::ceil(problem.fraction * static_cast<double>(visible));
    budget = max64(problem.min_blocks, static_cast<int64_t>(wanted));
  }
  budget = min64(max64(budget, forced), visible);
  std::nth_element(candidates.begin(), candidates.begin() + budget, candidates.end());
  return budget;
}

// The row's candidates, those that it keeps in front; how many it keeps.
int64_t rank_row(const SelectProblem& problem, const RowRules& rules, int64_t batch, int64_t head,
                 int64_t row, std::vector<Candidate>& candidates) {
  const float* scores = problem.scores + batch * problem.scores_stride_batch +
                        head * problem.scores_stride_head + row * problem.scores_stride_row;
  int64_t forced = 0;
  for (int64_t block = rules.visible.begin; block < rules.visible.end; ++block) {
    const bool must = rules.forced(block);
    forced += must;
    candidates.push_back({rank_of(scores[block], must), static_cast<int32_t>(block)});
  }
  return keep_best(problem, candidates, scores, forced);
}

int64_t keep_marked(const SelectProblem& problem, const RowRules& rules, int64_t flat,
                    std::vector<Candidate>& candidates) {
  const uint32_t* marks = problem.marks + flat * problem.num_mark_words();
  for (int64_t block = rules.visible.begin; block < rules.visible.end; ++block) {
    if (rules.forced(block) || (marks[block / 32] >> (block % 32) & 1u) != 0)
      candidates.push_back({0, static_cast<int32_t>(block)});
  }
  const int64_t surplus = static_cast<int64_t>(candidates.size()) - problem.capacity;
  if (surplus > 0) {
    const auto is_sink = [&](const Candidate& c) { return contains(rules.sink, c.block); };
    const auto first = std::find_if_not(candidates.begin(), candidates.end(), is_sink);
    const int64_t sinks = min64(first - candidates.begin(), problem.capacity);
    candidates.erase(candidates.begin() + sinks, candidates.begin() + sinks + surplus);
  }
  return static_cast<int64_t>(candidates.size());
}

// False when the row keeps more blocks than `capacity`; the row is then left empty.
bool select_row(const SelectProblem& problem, int64_t batch, int64_t head, int64_t row,
                std::vector<Candidate>& candidates) {
  const int64_t flat = (batch * problem.num_heads + head) * problem.num_q_blocks() + row;
  const RowRules rules = rules_of(problem, batch, row);
  candidates.clear();
  const int64_t kept = problem.rule == SelectRule::kMarked
                           ? keep_marked(problem, rules, flat, candidates)
                           : rank_row(problem, rules, batch, head, row, candidates);
  int32_t* columns = problem.columns + flat * problem.capacity;
  const bool fits = kept <= problem.capacity;
  const int64_t written = fits ? kept : 0;
  for (int64_t i = 0; i < written; ++i) columns[i] = candidates[i].block;
  std::sort(columns, columns + written);
  std::fill(columns + written, columns + problem.capacity, -1);
  problem.counts[flat] = static_cast<int32_t>(written);
  return fits;
}

void check(const SelectProblem& problem) {
  if (problem.block_q <= 0 || problem.block_k <= 0) {
    throw InvalidArgument("select_blocks: block_q and block_k must be positive, got " +
                          std::to_string(problem.block_q) + " and " +
                          std::to_string(problem.block_k));
  }
  if (problem.batch < 0 || problem.num_heads < 0 || problem.seqlen_q < 0 || problem.seqlen_k < 0 ||
      problem.capacity < 0) {
    throw InvalidArgument("select_blocks: sizes must not be negative");
  }
  if (problem.rule == SelectRule::kTopK && problem.topk < 0) {
    throw InvalidArgument("select_blocks: topk must not be negative, got " +
                          std::to_string(problem.topk));
  }
  const double share = problem.rule == SelectRule::kTopP ? problem.top_p : problem.fraction;
  const bool shares = problem.rule == SelectRule::kTopP || problem.rule == SelectRule::kFraction;
  if (shares && !(share >= 0.0 && share <= 1.0)) {
    throw InvalidArgument("select_blocks: fraction and top_p must lie in [0, 1], got " +
                          std::to_string(share));
  }
}

}  // namespace

void select_blocks(const SelectProblem& problem, const ParallelFor& parallel_for) {
  check(problem);
  const int64_t rows_per_head = problem.num_q_blocks();
  const int64_t rows = problem.batch * problem.num_heads * rows_per_head;
  if (rows == 0) return;
  std::atomic<bool> out_of_memory{false};
  std::atomic<bool> too_many{false};
  parallel_for(rows, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates;
    try {
      candidates.reserve(problem.num_k_blocks());  // the only allocation
    } catch (const std::exception&) {
      out_of_memory = true;
      return;
    }
    for (int64_t flat = begin; flat < end; ++flat) {
      const int64_t pair = flat / rows_per_head;
      const bool fits = select_row(problem, pair / problem.num_heads, pair % problem.num_heads,
                                   flat % rows_per_head, candidates);
      if (!fits) too_many = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
  if (too_many) {
    throw InvalidArgument("select_blocks: a row keeps more blocks than columns has room for (" +
                          std::to_string(problem.capacity) + ")");
  }
}

}  // namespace attnsieve::cpu
