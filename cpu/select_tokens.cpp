// cpu::select_tokens: lists of token or page scores -> TokenIndex, by exact radix selection.
//
// The forced ranges lie at the ends of a list. Of the candidates between them the score of the last
// one kept is found digit by digit from histograms; one more sweep in ascending order then keeps
// what is above it and the first of its equals. No copy of the list, no sort, and the time does not
// depend on the values.
#include <algorithm>
#include <array>

#include "attnsieve/launch.h"
#include "attnsieve/token_select.h"
#include "cpu/score_order.h"

namespace attnsieve::cpu {
namespace {

constexpr int kDigits = 3;
constexpr std::array<int, kDigits> kShift = {21, 10, 0};
constexpr std::array<int, kDigits> kBits = {11, 11, 10};
constexpr int kBins = 1 << 11;

// Keeps scores that rank above `order`, and the first `equals` that rank equal to it.
struct Cut {
  uint32_t order;
  int64_t equals;
};

// The cut that keeps `budget` of the scores in [begin, end); 0 < budget <= end - begin.
Cut find_cut(const float* scores, int64_t begin, int64_t end, int64_t budget) {
  std::array<int64_t, kBins> histogram;
  uint32_t found = 0;  // leading digits of the cut
  int64_t missing = budget;
  for (int digit = 0; digit < kDigits; ++digit) {
    histogram.fill(0);
    const uint32_t mask = (1u << kBits[digit]) - 1;
    const int above = kShift[digit] + kBits[digit];
    for (int64_t j = begin; j < end; ++j) {
      const uint32_t order = score_order(scores[j]);
      if (digit > 0 && order >> above != found >> above) continue;
      ++histogram[(order >> kShift[digit]) & mask];
    }
    uint32_t bin = mask;
    while (histogram[bin] < missing) missing -= histogram[bin--];
    found |= bin << kShift[digit];
  }
  return {found, missing};
}

int64_t count_above(const float* scores, int64_t begin, int64_t end, float threshold) {
  int64_t above = 0;
  for (int64_t j = begin; j < end; ++j) above += scores[j] > threshold;
  return above;
}

void select_list(const TokenSelectProblem& problem, int64_t batch, int64_t row, int64_t list) {
  const float* scores = problem.scores + batch * problem.scores_stride_batch +
                        row * problem.scores_stride_row + list * problem.scores_stride_head;
  const TokenCandidates candidates = token_candidates(problem, batch, row);
  const int64_t begin = candidates.begin;
  const int64_t end = candidates.end;
  const int64_t forced = candidates.forced();
  int64_t wanted = candidates.ranked();
  if (problem.rule == TokenRule::kThreshold)
    wanted = count_above(scores, begin, end, token_threshold(problem, batch, list));
  const int64_t budget = min64(wanted, problem.capacity - forced);

  const int64_t flat = (batch * problem.seqlen_q + row) * problem.num_lists + list;
  int32_t* const entries = problem.indices + flat * problem.capacity;
  int32_t* next = entries;
  const auto entry = [&](int64_t j) {
    return token_entry(problem, batch, static_cast<uint32_t>(j));
  };
  for (int64_t j = 0; j < begin; ++j) *next++ = entry(j);
  if (budget > 0) {
    Cut cut = find_cut(scores, begin, end, budget);
    for (int64_t j = begin; j < end; ++j) {
      const uint32_t order = score_order(scores[j]);
      if (order < cut.order || (order == cut.order && cut.equals-- <= 0)) continue;
      *next++ = entry(j);
    }
  }
  for (int64_t j = end; j < candidates.count; ++j) *next++ = entry(j);
  problem.counts[flat] = static_cast<int32_t>(next - entries);
  if (problem.passed != nullptr) problem.passed[flat] = static_cast<int32_t>(forced + wanted);
  std::fill(next, entries + problem.capacity, -1);
}

}  // namespace

void select_tokens(const TokenSelectProblem& problem, const ParallelFor& parallel_for) {
  check_token_select(problem);
  const int64_t per_batch = problem.seqlen_q * problem.num_lists;
  const int64_t lists = problem.batch * per_batch;
  if (lists == 0) return;
  parallel_for(lists, [&](int64_t first, int64_t last) {
    for (int64_t flat = first; flat < last; ++flat) {
      const int64_t in_batch = flat % per_batch;
      select_list(problem, flat / per_batch, in_batch / problem.num_lists,
                  in_batch % problem.num_lists);
    }
  });
}

}  // namespace attnsieve::cpu
