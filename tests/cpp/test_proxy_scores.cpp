// cpu::proxy_scores against double loops, over allocations of their exact size: with sanitizers, a
// bad page or length that is followed is an error here.
#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>
#include <memory>
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

constexpr int kDim = 8;
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int32_t kBadIds[] = {INT32_MIN, -123456, -1, 114514, INT32_MAX};

// Members of a reduction; empty: -inf.
double reduce(Reduction how, const std::vector<double>& members) {
  if (members.empty()) return -kInf;
  double result = members[0];
  for (size_t i = 1; i < members.size(); ++i)
    result = how == Reduction::kMax ? std::max(result, members[i]) : result + members[i];
  return how == Reduction::kMean ? result / static_cast<double>(members.size()) : result;
}

struct Case {
  explicit Case(uint32_t seed) : rng(seed) {}

  std::unique_ptr<float[]> random(int64_t count) {
    std::normal_distribution<float> normal;
    std::unique_ptr<float[]> data(new float[std::max<int64_t>(1, count)]);
    for (int64_t i = 0; i < count; ++i) data[i] = normal(rng);
    return data;
  }

  Reduction any_reduction(int64_t least) {
    return static_cast<Reduction>(least + static_cast<int64_t>(rng() % (4 - least)));
  }

  bool bounds() const { return problem.element == ProxyElement::kBounds; }

  void build() {
    const int64_t key_heads = 1 + rng() % 3;
    problem.batch = 1 + rng() % 2;
    problem.num_key_heads = key_heads;
    problem.num_heads = key_heads * (1 + rng() % 12);
    const int64_t outs[] = {1, key_heads, problem.num_heads};
    problem.num_out_heads = outs[rng() % 3];
    problem.num_rows = 1 + rng() % (rng() % 4 == 0 ? 130 : 5);
    problem.head_dim = kDim;
    problem.element = static_cast<ProxyElement>(rng() % 3);
    problem.row_reduce = any_reduction(0);
    problem.softmax = rng() % 2 == 0;
    problem.head_reduce = any_reduction(problem.num_out_heads == problem.num_heads ? 0 : 1);
    problem.page_reduce = bounds() ? Reduction::kNone : any_reduction(0);
    problem.page_size = 1 + rng() % 40;
    problem.skip_first = rng() % 4;
    problem.skip_last = rng() % 4;
    problem.causal = rng() % 2 == 0;
    problem.score_scale = 0.4f;
    const int64_t rows = problem.num_heads * problem.num_rows;
    q = random(problem.batch * rows * kDim);
    problem.q = {q.get(), rows * kDim, problem.num_rows * kDim, kDim};
    weights = random(problem.batch * rows);
    if (rng() % 2 == 0) problem.head_weights = {weights.get(), rows, problem.num_rows, 1};
    build_keys();
    const int64_t out_rows = problem.row_reduce == Reduction::kNone ? problem.num_rows : 1;
    size = problem.batch * out_rows * problem.num_out_heads * problem.columns();
    scores = random(size);
    problem.scores = scores.get();
  }

  void build_keys() {
    PagedKv& pages = problem.pages;
    pages.page_size = bounds() ? 1 : 1 + rng() % 20;
    pages.num_pages = 1 + rng() % 12;
    pages.max_pages = 1 + rng() % 60;
    pages.table_stride_batch = pages.max_pages;
    for (int64_t i = 0; i < problem.batch * pages.max_pages; ++i) {
      const bool bad = rng() % 6 == 0;
      table.push_back(bad ? kBadIds[rng() % 5] : static_cast<int32_t>(rng() % pages.num_pages));
    }
    problem.units = pages.capacity();
    const int64_t keys_held = problem.units * problem.unit_keys();
    for (int64_t b = 0; b < problem.batch; ++b)
      lengths.push_back(rng() % 6 == 0 ? kBadIds[rng() % 5]
                                       : static_cast<int32_t>(rng() % (keys_held + 1)));
    table.shrink_to_fit();
    lengths.shrink_to_fit();
    pages.block_table = table.data();
    pages.seq_lens = lengths.data();
    const int64_t width = bounds() ? 2 * kDim : kDim;
    const int64_t row = problem.num_key_heads * width;
    const int64_t rows = pages.num_pages * pages.page_size;
    keys = random(rows * row);
    if (bounds())
      for (int64_t i = 0; i < rows * row; ++i)
        if (i % width >= kDim) keys[i] = keys[i - kDim] + std::abs(keys[i]);
    problem.keys = {keys.get(), pages.page_size * row, width, row};
    problem.keys_stride_bound = kDim;
  }

  double element(int64_t b, int64_t h, int64_t i, const float* key) const {
    const int64_t row = (b * problem.num_heads + h) * problem.num_rows + i;
    double sum = 0.0;
    for (int d = 0; d < kDim; ++d) {
      const double x = q[row * kDim + d];
      sum += bounds() ? std::max(x * key[d], x * key[kDim + d]) : x * key[d];
    }
    if (problem.element == ProxyElement::kReluDot) sum = std::max(sum, 0.0);
    return sum * problem.score_scale * (problem.head_weights.data ? weights[row] : 1.0);
  }

  // Scores of query head h per row that is kept and unit; -inf where it is no candidate.
  std::vector<std::vector<double>> head_scores(int64_t b, int64_t h) const {
    const PagedKv& pages = problem.pages;
    const int64_t unit_keys = problem.unit_keys();
    const int64_t length =
        std::max<int64_t>(0, std::min<int64_t>(lengths[b], problem.units * unit_keys));
    const int64_t last = (length + unit_keys - 1) / unit_keys - problem.skip_last;
    const bool reduced = problem.row_reduce != Reduction::kNone;
    std::vector<std::vector<double>> result(reduced ? 1 : problem.num_rows,
                                            std::vector<double>(problem.units, -kInf));
    const int64_t group = problem.num_heads / problem.num_key_heads;
    for (int64_t u = problem.skip_first; u < last; ++u) {
      const int64_t page = table[b * pages.max_pages + u / pages.page_size];
      if (page < 0 || page >= pages.num_pages) continue;
      const float* key = keys.get() + page * problem.keys.stride_batch +
                         h / group * problem.keys.stride_head +
                         u % pages.page_size * problem.keys.stride_row;
      std::vector<double> seen;
      for (int64_t i = 0; i < problem.num_rows; ++i) {
        if (problem.causal && u * unit_keys > i + length - problem.num_rows) continue;
        seen.push_back(element(b, h, i, key));
        if (!reduced) result[i][u] = seen.back();
      }
      if (reduced) result[0][u] = reduce(problem.row_reduce, seen);
    }
    if (!problem.softmax) return result;
    for (std::vector<double>& row : result) {
      double sum = 0.0;
      for (const double x : row) sum += std::exp(x);
      for (double& x : row) x = x == -kInf ? x : std::exp(x) / sum;
    }
    return result;
  }

  void check_all() {
    cpu::proxy_scores(problem, threaded<3>());
    const bool reduced = problem.row_reduce != Reduction::kNone;
    const int64_t out_rows = reduced ? 1 : problem.num_rows;
    const int64_t group = problem.num_heads / problem.num_out_heads;
    for (int64_t b = 0; b < problem.batch; ++b) {
      for (int64_t out = 0; out < problem.num_out_heads; ++out) {
        std::vector<std::vector<std::vector<double>>> heads;
        for (int64_t h = out * group; h < (out + 1) * group; ++h)
          heads.push_back(head_scores(b, h));
        for (int64_t i = 0; i < out_rows; ++i) check_row(b, out, i, out_rows, heads);
      }
    }
  }

  void check_row(int64_t b, int64_t out, int64_t i, int64_t out_rows,
                 const std::vector<std::vector<std::vector<double>>>& heads) const {
    const int64_t page = problem.units_per_column();
    for (int64_t column = 0; column < problem.columns(); ++column) {
      std::vector<double> members;
      for (int64_t u = column * page; u < std::min((column + 1) * page, problem.units); ++u) {
        std::vector<double> own;
        for (const auto& head : heads) own.push_back(head[i][u]);
        if (own[0] > -kInf) members.push_back(reduce(problem.head_reduce, own));
      }
      const double wanted = reduce(problem.page_reduce, members);
      const float got =
          scores[((b * out_rows + i) * problem.num_out_heads + out) * problem.columns() + column];
      CHECK(got == wanted || std::abs(got - wanted) < 1e-4 * (1.0 + std::abs(wanted)));
    }
  }

  std::mt19937 rng;
  ProxyScoresProblem problem;
  std::unique_ptr<float[]> q, weights, keys, scores;
  int64_t size = 0;
  std::vector<int32_t> table, lengths;
};

void test_random() {
  for (uint32_t seed = 0; seed < 400; ++seed) {
    check::context = "seed " + std::to_string(seed);
    Case one(seed);
    one.build();
    one.check_all();
  }
}

void test_refusals() {
  const auto refused = [](auto change) {
    Case one(3);
    one.build();
    change(one.problem);
    try {
      cpu::proxy_scores(one.problem, serial());
    } catch (const InvalidArgument&) {
      return true;
    } catch (const Unsupported&) {
      return true;
    }
    return false;
  };
  check::context = "refusals";
  CHECK(!refused([](ProxyScoresProblem&) {}));
  CHECK(refused([](ProxyScoresProblem& p) { p.head_dim = 12; }));
  CHECK(refused([](ProxyScoresProblem& p) { p.num_key_heads = 0; }));
  CHECK(refused([](ProxyScoresProblem& p) { p.num_out_heads = p.num_heads + 1; }));
  CHECK(refused([](ProxyScoresProblem& p) { p.page_size = 0; }));
  CHECK(refused([](ProxyScoresProblem& p) { p.skip_last = -1; }));
}

}  // namespace

int main() {
  test_random();
  test_refusals();
  return check::finish();
}
