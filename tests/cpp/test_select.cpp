// cpu::select_blocks against a ranking written out the slow way.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"
#include "check.h"
#include "threads.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

struct Select {
  Select(int64_t seqlen_q, int64_t seqlen_k, int block_q, int block_k, int64_t batch = 1,
         int64_t heads = 1) {
    problem.batch = batch;
    problem.num_heads = heads;
    problem.seqlen_q = seqlen_q;
    problem.seqlen_k = seqlen_k;
    problem.block_q = block_q;
    problem.block_k = block_k;
    problem.capacity = static_cast<int32_t>(problem.num_k_blocks());
    problem.scores_stride_row = problem.num_k_blocks() + 2;  // padded rows
    problem.scores_stride_head = problem.num_q_blocks() * problem.scores_stride_row;
    problem.scores_stride_batch = heads * problem.scores_stride_head;
    scores.assign(batch * problem.scores_stride_batch, NAN);
  }

  void run() {
    const int64_t rows = problem.batch * problem.num_heads * problem.num_q_blocks();
    counts.assign(rows, -7);
    columns.assign(rows * problem.capacity, -7);
    problem.scores = scores.data();
    problem.counts = counts.data();
    problem.columns = columns.data();
    cpu::select_blocks(problem, threaded<3>());
  }

  std::vector<int32_t> row(int64_t r) const {
    const int32_t* line = columns.data() + r * problem.capacity;
    return {line, line + counts[r]};
  }

  float* score_row(int64_t r) {
    const int64_t head = r / problem.num_q_blocks();
    return scores.data() + head * problem.scores_stride_head +
           r % problem.num_q_blocks() * problem.scores_stride_row;
  }

  SelectProblem problem;
  std::vector<float> scores;
  std::vector<int32_t> counts, columns;
};

std::vector<int32_t> expected_row(const SelectProblem& p, int64_t r, const float* scores) {
  const KeyRange keys = visible_keys(p.mask, r * p.block_q, min64((r + 1) * p.block_q, p.seqlen_q),
                                     p.seqlen_q, p.seqlen_k);
  const KeyRange diagonal = diagonal_blocks(r, p.block_q, p.block_k, p.seqlen_q, p.seqlen_k);
  std::vector<int32_t> visible;
  std::set<int32_t> forced;
  for (int32_t j = 0; j < p.num_k_blocks(); ++j) {
    if (keys.begin >= keys.end || j * int64_t{p.block_k} >= keys.end ||
        (j + 1) * int64_t{p.block_k} <= keys.begin) {
      continue;
    }
    visible.push_back(j);
    const bool on_diagonal = j >= diagonal.begin && j < diagonal.end;
    const bool local =
        diagonal.begin < diagonal.end && j < diagonal.begin && j >= diagonal.begin - p.local_blocks;
    if (j < p.sink_blocks || (p.force_diagonal && on_diagonal) || local) forced.insert(j);
  }
  std::vector<int32_t> ranking = visible;
  std::stable_sort(ranking.begin(), ranking.end(), [&](int32_t a, int32_t b) {
    if (forced.count(a) != forced.count(b)) return forced.count(a) > forced.count(b);
    if (std::isnan(scores[a]) || std::isnan(scores[b]))
      return std::isnan(scores[b]) && !std::isnan(scores[a]);
    return scores[a] > scores[b];
  });
  size_t kept = 0;
  if (p.rule == SelectRule::kTopP) {
    double max = -INFINITY;
    for (int32_t j : visible) max = std::isnan(scores[j]) ? max : std::max<double>(max, scores[j]);
    auto mass = [&](int32_t j) -> double {
      if (std::isnan(scores[j]) || max == -INFINITY) return 0.0;
      if (std::isinf(max)) return scores[j] == INFINITY;
      return std::exp(scores[j] - max);
    };
    double total = 0.0, sum = 0.0;
    for (int32_t j : visible) total += mass(j);
    while (kept < ranking.size()) {
      // 1e-7 forgives the integer masses; the test's scores keep clear of such ties
      const bool enough = sum >= p.top_p * total * (1 - 1e-7);
      if (kept >= forced.size() && static_cast<int64_t>(kept) >= p.min_blocks && enough) break;
      sum += mass(ranking[kept++]);
    }
  } else {
    int64_t budget = p.topk;
    if (p.rule == SelectRule::kFraction) {
      budget = std::max<int64_t>(
          p.min_blocks, static_cast<int64_t>(std::ceil(p.fraction * double(visible.size()))));
    }
    kept = std::min(visible.size(), std::max<size_t>(budget, forced.size()));
  }
  std::vector<int32_t> row(ranking.begin(), ranking.begin() + kept);
  std::sort(row.begin(), row.end());
  return row;
}

void random_cases() {
  std::mt19937 rng(11);
  std::normal_distribution<float> normal;
  for (uint32_t seed = 0; seed < 400; ++seed) {
    const int64_t sq = 1 + rng() % 900;
    const int64_t sk = 1 + rng() % 1500;
    Select s(sq, sk, rng() % 2 ? 64 : 128, 16 << rng() % 4, 2, 2);
    SelectProblem& p = s.problem;
    p.rule = static_cast<SelectRule>(rng() % 3);
    p.topk = static_cast<int32_t>(rng() % 8);
    p.fraction = (rng() % 11) / 10.0;
    p.top_p = (rng() % 10) / 10.0;
    p.min_blocks = static_cast<int32_t>(rng() % 4);
    p.sink_blocks = static_cast<int32_t>(rng() % 3);
    p.local_blocks = static_cast<int32_t>(rng() % 3);
    p.force_diagonal = rng() % 2;
    p.mask.causal = rng() % 2;
    if (rng() % 3 == 0) p.mask.window_left = rng() % 400;
    if (rng() % 5 == 0) p.mask.window_right = rng() % 400;
    const bool ties = p.rule != SelectRule::kTopP && rng() % 2;
    for (float& x : s.scores) x = ties ? static_cast<float>(rng() % 3) - 1.0f : normal(rng) * 3.0f;
    if (rng() % 3 == 0) {
      for (float& x : s.scores) {
        if (rng() % 4 == 0) x = rng() % 2 ? NAN : -INFINITY;
      }
    }
    s.run();
    check::context = "seed " + std::to_string(seed);
    bool ok = true;
    bool tail = true;
    for (size_t r = 0; r < s.counts.size(); ++r) {
      const int64_t q_block = static_cast<int64_t>(r) % p.num_q_blocks();
      ok = ok && s.row(r) == expected_row(p, q_block, s.score_row(r));
      for (int32_t i = s.counts[r]; i < p.capacity; ++i)
        tail = tail && s.columns[r * p.capacity + i] == -1;
    }
    CHECK(ok);
    CHECK(tail);
  }
}

using Row = std::vector<int32_t>;

void ties_nan_and_infinities() {
  Select s(64, 6 * 64, 64, 64);
  SelectProblem& p = s.problem;
  p.topk = 3;
  auto with = [&](std::vector<float> scores) {
    std::copy(scores.begin(), scores.end(), s.scores.begin());
    s.run();
    return s.row(0);
  };
  const float nan = NAN, inf = INFINITY;
  check::context = "topk by hand";
  CHECK(with({1, 1, 1, 1, 1, 1}) == (Row{0, 1, 2}));
  CHECK(with({0.0f, -0.0f, 0.0f, -0.0f, 1, 0}) == (Row{0, 1, 4}));
  CHECK(with({nan, nan, -inf, nan, -inf, nan}) == (Row{0, 2, 4}));
  CHECK(with({nan, nan, nan, nan, nan, nan}) == (Row{0, 1, 2}));
  CHECK(with({-inf, inf, 3, inf, nan, 5}) == (Row{1, 3, 5}));
  p.topk = 0;
  CHECK(with({1, 1, 1, 1, 1, 1}).empty());
  p.sink_blocks = 2;
  p.force_diagonal = true;
  CHECK(with({-inf, nan, 9, 9, 9, nan}) ==
        (Row{0, 1, 5}));  // more forced blocks than budget: all are kept

  check::context = "top_p by hand";
  p.sink_blocks = 0;
  p.force_diagonal = false;
  p.rule = SelectRule::kTopP;
  p.min_blocks = 1;
  p.top_p = 0.5;
  CHECK(with({0, 0, 0, 0, 0, 0}) == (Row{0, 1, 2}));
  CHECK(with({-inf, inf, 3, inf, nan, 5}) == (Row{1}));
  p.top_p = 0.51;
  CHECK(with({-inf, inf, 3, inf, nan, 5}) == (Row{1, 3}));
  p.top_p = 1.0;
  CHECK(with({0, 0, -inf, 0, nan, 0}) == (Row{0, 1, 3, 5}));
  CHECK(with({nan, nan, -inf, nan, nan, nan}) == (Row{2}));
  p.min_blocks = 3;
  CHECK(with({nan, nan, -inf, nan, nan, nan}) == (Row{0, 1, 2}));
  p.top_p = 0.0;
  p.min_blocks = 0;
  CHECK(with({1, 2, 3, 4, 5, 6}).empty());
}

void refusals() {
  check::context = "refusals";
  Select s(64, 6 * 64, 64, 64);
  auto refused = [&] {
    try {
      s.run();
    } catch (const InvalidArgument&) {
      return true;
    }
    return false;
  };
  s.problem.topk = 4;
  s.problem.capacity = 3;
  CHECK(refused());
  s.problem.topk = 3;
  CHECK(!refused());
  s.problem.topk = -1;
  CHECK(refused());
  s.problem.rule = SelectRule::kTopP;
  for (double bad : {-0.1, 1.1, double{NAN}}) {
    s.problem.top_p = bad;
    CHECK(refused());
  }
  Select empty(0, 100, 64, 64);
  empty.problem.topk = 1;
  empty.run();
  Select no_keys(100, 0, 64, 64);
  no_keys.problem.topk = 1;
  no_keys.run();
  CHECK(no_keys.counts == (std::vector<int32_t>{0, 0}));
}

}  // namespace

int main() {
  random_cases();
  ties_nan_and_infinities();
  refusals();
  return check::finish();
}
