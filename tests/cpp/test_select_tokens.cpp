// cpu::select_tokens against a ranking written out the slow way, with guards around every output.
#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "check.h"
#include "threads.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int32_t kGuard = -77;

// Scores in an allocation of their exact size, so that sanitizers see a read past a list.
struct Select {
  Select(int64_t batch, int64_t rows, int64_t lists, int64_t columns, int32_t capacity) {
    problem.batch = batch;
    problem.seqlen_q = rows;
    problem.num_lists = lists;
    problem.columns = columns;
    problem.capacity = capacity;
    problem.scores_stride_head = columns;
    problem.scores_stride_row = lists * columns;
    problem.scores_stride_batch = rows * lists * columns;
    scores.reset(new float[std::max<int64_t>(1, size())]);
  }

  int64_t num_lists() const { return problem.batch * problem.seqlen_q * problem.num_lists; }
  int64_t size() const { return num_lists() * problem.columns; }

  void run() {
    indices.assign(num_lists() * problem.capacity + 1, kGuard);
    counts.assign(num_lists() + 1, kGuard);
    passed.assign(num_lists() + 1, kGuard);
    problem.scores = scores.get();
    problem.indices = indices.data();
    problem.counts = counts.data();
    problem.passed = passed.data();
    if (!seq_lens.empty()) problem.pages.seq_lens = seq_lens.data();
    cpu::select_tokens(problem, threaded<3>());
    CHECK(indices.back() == kGuard && counts.back() == kGuard && passed.back() == kGuard);
  }

  // What list `flat` must hold: a full sort of its candidates.
  std::vector<int32_t> expected(int64_t flat, int64_t* passes) const {
    const int64_t row = flat / problem.num_lists % problem.seqlen_q;
    const int64_t batch = flat / problem.num_lists / problem.seqlen_q;
    const float* own = scores.get() + flat * problem.columns;
    int64_t n = problem.columns;
    if (!seq_lens.empty()) {
      const double keys = seq_lens[batch] - (problem.causal ? problem.seqlen_q - 1.0 - row : 0.0);
      const double pages = std::ceil(keys / static_cast<double>(problem.page_size));
      n = static_cast<int64_t>(std::min(std::max(pages, 0.0), static_cast<double>(n)));
    }
    const auto forced = [&](int64_t j) { return j < problem.sink || j >= n - problem.recent; };
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      if (forced(a) != forced(b)) return forced(a);
      if (!forced(a)) {
        const bool nan_a = std::isnan(own[a]), nan_b = std::isnan(own[b]);
        if (nan_a != nan_b) return nan_b;
        if (!nan_a && own[a] != own[b]) return own[a] > own[b];
      }
      return a < b;
    });
    if (problem.rule == TokenRule::kThreshold) {
      const float limit = problem.threshold.value;
      order.erase(std::remove_if(order.begin(), order.end(),
                                 [&](int32_t j) { return !forced(j) && !(own[j] > limit); }),
                  order.end());
    }
    *passes = static_cast<int64_t>(order.size());
    if (*passes > problem.capacity) order.resize(problem.capacity);
    std::sort(order.begin(), order.end());
    return order;
  }

  void check_all() {
    run();
    for (int64_t flat = 0; flat < num_lists(); ++flat) {
      int64_t passes = 0;
      std::vector<int32_t> want = expected(flat, &passes);
      CHECK(counts[flat] == static_cast<int32_t>(want.size()));
      CHECK(passed[flat] == passes);
      want.resize(problem.capacity, -1);
      CHECK(std::equal(want.begin(), want.end(), indices.begin() + flat * problem.capacity));
    }
  }

  TokenSelectProblem problem;
  std::unique_ptr<float[]> scores;
  std::vector<int32_t> seq_lens, indices, counts, passed;
};

// 0 normal, 1 ties, 2 equal, 3 specials, 4 any bit pattern.
void fill(Select& select, int kind, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  const float specials[] = {NAN, -NAN, kInf, -kInf, 0.0f, -0.0f, 1e-45f, -1e-45f, 3e38f, -3e38f};
  for (int64_t i = 0; i < select.size(); ++i) {
    float value = normal(rng);
    if (kind == 1) value = std::round(value);
    if (kind == 2) value = -0.25f;
    if (kind == 3 && rng() % 2 == 0) value = specials[rng() % 10];
    if (kind == 4) {
      const uint32_t bits = rng();
      std::copy_n(reinterpret_cast<const char*>(&bits), sizeof bits,
                  reinterpret_cast<char*>(&value));
    }
    select.scores[i] = value;
  }
}

void test_random() {
  std::mt19937 rng(1);
  for (int round = 0; round < 400; ++round) {
    const int64_t columns = rng() % 300;
    const int32_t capacity = static_cast<int32_t>(rng() % 80);
    Select select(1 + rng() % 3, 1 + rng() % 4, 1 + rng() % 3, columns, capacity);
    fill(select, static_cast<int>(rng() % 5), round);
    TokenSelectProblem& problem = select.problem;
    problem.sink = rng() % 4;
    problem.recent = rng() % 4;
    if (problem.sink + problem.recent > capacity) problem.sink = problem.recent = 0;
    problem.page_size = rng() % 2 == 0 ? 1 : 16;
    if (rng() % 3 != 0) {
      problem.causal = rng() % 2 == 0;
      for (int64_t b = 0; b < problem.batch; ++b) {
        const int64_t longest = columns * problem.page_size + 5;
        select.seq_lens.push_back(static_cast<int32_t>(rng() % (longest + 1)));
      }
      if (rng() % 8 == 0) select.seq_lens[0] = rng() % 2 == 0 ? INT32_MIN : INT32_MAX;
    }
    if (rng() % 2 == 0) {
      problem.rule = TokenRule::kThreshold;
      const float limits[] = {-kInf, -0.5f, 0.0f, 1.0f, kInf, NAN};
      problem.threshold.value = limits[rng() % 6];
    }
    check::context = "round " + std::to_string(round);
    select.check_all();
  }
}

void test_slots() {
  Select select(2, 1, 1, 20, 20);
  fill(select, 0, 3);
  PagedKv& pages = select.problem.pages;
  const int32_t table[] = {1, 4, 0, 3, -1, INT32_MAX};  // two of the three pages of 8 tokens a row
  pages.block_table = table;
  pages.table_stride_batch = 3;
  pages.max_pages = 2;  // tokens 16 .. 19 lie behind the table
  pages.num_pages = 4;
  pages.page_size = 8;
  select.run();
  check::context = "slots";
  for (int b = 0; b < 2; ++b) {
    CHECK(select.counts[b] == 20);
    for (int j = 0; j < 20; ++j) {
      const int64_t page = j < 16 ? table[b * 3 + j / 8] : -1;
      const int64_t want = page >= 0 && page < 4 ? page * 8 + j % 8 : -1;
      CHECK(select.indices[b * 20 + j] == want);
    }
  }
}

void test_refusals() {
  const auto refused = [](auto change) {
    Select select(1, 1, 1, 8, 4);
    fill(select, 0, 1);
    change(select.problem);
    try {
      cpu::select_tokens(select.problem, serial());
    } catch (const InvalidArgument&) {
      return true;
    }
    return false;
  };
  check::context = "refusals";
  CHECK(refused([](TokenSelectProblem& p) { p.sink = 5; }));
  CHECK(refused([](TokenSelectProblem& p) { p.sink = INT64_MAX, p.recent = INT64_MAX; }));
  CHECK(refused([](TokenSelectProblem& p) { p.recent = -1; }));
  CHECK(refused([](TokenSelectProblem& p) { p.page_size = 0; }));
  CHECK(refused([](TokenSelectProblem& p) { p.columns = -1; }));
  CHECK(refused([](TokenSelectProblem& p) { p.columns = int64_t{1} << 31; }));
}

}  // namespace

int main() {
  test_random();
  test_slots();
  test_refusals();
  return check::finish();
}
