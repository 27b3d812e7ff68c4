// cpu::threshold_decode against a double walk, over allocations of their exact size: with
// sanitizers, a page, length or column that is followed too far is an error here.
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
constexpr double kMargin = 1e-4;  // decisions closer to the threshold may fall either way
constexpr int32_t kBadIds[] = {INT32_MIN, -123456, -1, 114514, INT32_MAX};

struct Case {
  explicit Case(uint32_t seed) : rng(seed) {}

  std::unique_ptr<float[]> random(int64_t count) {
    std::normal_distribution<float> normal;
    std::unique_ptr<float[]> data(new float[std::max<int64_t>(1, count)]);
    for (int64_t i = 0; i < count; ++i) data[i] = normal(rng);
    return data;
  }

  void build() {
    problem.batch = 1 + rng() % 2;
    problem.num_kv_heads = 1 + rng() % 2;
    group = 1 + rng() % 20;
    problem.num_heads = problem.num_kv_heads * group;
    problem.seqlen_q = 1 + rng() % kMaxDecodeRows;
    problem.head_dim = kDim;
    problem.softmax_scale = 1.0f;
    problem.causal = rng() % 4 != 0;
    problem.num_splits = 1 + rng() % (rng() % 8 == 0 ? kMaxDecodeSplits : 4);
    const int64_t rows = problem.num_heads * problem.seqlen_q;
    q = random(problem.batch * rows * kDim);
    out = random(problem.batch * rows * kDim);
    lse = random(problem.batch * rows);
    counters.resize(2 * problem.batch * problem.num_heads, -1);
    problem.q = {q.get(), rows * kDim, problem.seqlen_q * kDim, kDim};
    problem.out = {out.get(), rows * kDim, problem.seqlen_q * kDim, kDim};
    problem.lse = {lse.get(), rows, problem.seqlen_q, 1};
    Threshold& threshold = problem.threshold;
    threshold.enabled = true;
    threshold.skip_block = rng() % 2 == 0 ? 64 : 128;
    threshold.counters = counters.data();
    const float choices[] = {0.0f, 0.05f, 0.5f, 2.0f, std::numeric_limits<float>::infinity()};
    for (int64_t i = 0; i < problem.batch * problem.num_heads; ++i)
      lambdas.push_back(choices[rng() % 16 == 0 ? 0 : 1 + (problem.seqlen_q + i % 2) % 4]);
    threshold.per_head = lambdas.data();
    threshold.stride_batch = problem.num_heads;
    threshold.stride_head = 1;
    build_cache();
  }

  void build_cache() {
    PagedKv& paged = problem.paged;
    paged.page_size = 1 + rng() % 90;
    paged.max_pages = rng() % 12;
    paged.num_pages = std::max<int64_t>(1, problem.batch * paged.max_pages);
    paged.table_stride_batch = paged.max_pages;
    for (int64_t i = 0; i < problem.batch * paged.max_pages; ++i)
      table.push_back(rng() % 9 == 0 ? kBadIds[rng() % 5] : static_cast<int32_t>(i));
    table.shrink_to_fit();
    problem.seqlen_k = paged.capacity();
    for (int64_t b = 0; b < problem.batch; ++b)
      lengths.push_back(rng() % 5 == 0 ? kBadIds[rng() % 5]
                                       : static_cast<int32_t>(rng() % (problem.seqlen_k + 1)));
    paged.block_table = table.data() ? table.data() : lengths.data();
    paged.seq_lens = lengths.data();
    const int64_t row = problem.num_kv_heads * kDim;
    k = random(paged.num_pages * paged.page_size * row);
    v = random(paged.num_pages * paged.page_size * row);
    // Pages differ in size, so that some tiles matter less.
    for (int64_t p = 0; p < paged.num_pages; ++p) {
      const float size = 2.0f * (rng() % 8) / 8;
      for (int64_t i = 0; i < paged.page_size * row; ++i) k[p * paged.page_size * row + i] *= size;
    }
    problem.k = {k.get(), paged.page_size * row, kDim, row};
    problem.v = {v.get(), paged.page_size * row, kDim, row};
  }

  // Row of the cache, or -1 where query row i does not attend to key j.
  int64_t place(int64_t b, int64_t length, int64_t i, int64_t j) const {
    const PagedKv& paged = problem.paged;
    if (j >= (problem.causal ? length - problem.seqlen_q + i + 1 : length)) return -1;
    const int64_t page = table[b * paged.max_pages + j / paged.page_size];
    if (page < 0 || page >= paged.num_pages) return -1;
    return page * paged.page_size + j % paged.page_size;
  }

  double logit(int64_t b, int64_t h, int64_t i, int64_t row) const {
    const float* query = &q[((b * problem.num_heads + h) * problem.seqlen_q + i) * kDim];
    const float* key = &k[(row * problem.num_kv_heads + h / group) * kDim];
    double sum = 0.0;
    for (int d = 0; d < kDim; ++d) sum += double{query[d]} * key[d];
    return sum;
  }

  void check_all() {
    cpu::threshold_decode(problem, threaded<3>());
    const int64_t heads = std::min<int64_t>(group, kMaxDecodeGroup / problem.seqlen_q);
    for (int64_t b = 0; b < problem.batch; ++b)
      for (int64_t first = 0; first < problem.num_heads; first += group)
        for (int64_t h = first; h < first + group; h += heads)
          check_group(b, h, std::min(h + heads, first + group));
  }

  void check_group(int64_t b, int64_t h0, int64_t h1) {
    const int64_t length = std::max<int64_t>(0, std::min<int64_t>(lengths[b], problem.seqlen_k));
    const int64_t width = problem.threshold.skip_block;
    const int64_t tiles = (length + width - 1) / width;
    const int64_t rows = (h1 - h0) * problem.seqlen_q;
    std::vector<bool> kept(tiles, true);
    int64_t dropped = 0;
    double margin = kInf;
    for (int64_t split = 0; split < problem.num_splits; ++split) {
      std::vector<double> running(rows, -kInf);
      for (int64_t visit = split; visit < tiles; visit += problem.num_splits) {
        const int64_t tile = visit == 0 ? tiles - 1 : visit - 1;
        std::vector<double> top(rows, -kInf);
        double nearest = -kInf;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t h = h0 + r / problem.seqlen_q;
          const int64_t i = r % problem.seqlen_q;
          for (int64_t j = tile * width; j < std::min(length, (tile + 1) * width); ++j) {
            const int64_t row = place(b, length, i, j);
            if (row >= 0) top[r] = std::max(top[r], logit(b, h, i, row));
          }
          const float lambda = lambdas[b * problem.num_heads + h];
          if (lambda == 0.0f || (top[r] > -kInf && running[r] == -kInf)) nearest = kInf;
          if (top[r] > -kInf) nearest = std::max(nearest, top[r] - running[r] - std::log(lambda));
        }
        if (visit != split) {
          margin = std::min(margin, std::abs(nearest));
          kept[tile] = nearest >= 0.0;
          dropped += kept[tile] ? 0 : 1;
        }
        for (int64_t r = 0; kept[tile] && r < rows; ++r) running[r] = std::max(running[r], top[r]);
      }
    }
    if (margin < kMargin) return;
    skipped += dropped;
    for (int64_t h = h0; h < h1; ++h) {
      CHECK(counters[2 * (b * problem.num_heads + h)] == dropped);
      CHECK(counters[2 * (b * problem.num_heads + h) + 1] == tiles);
      for (int64_t i = 0; i < problem.seqlen_q; ++i) check_row(b, h, i, length, kept);
    }
  }

  void check_row(int64_t b, int64_t h, int64_t i, int64_t length, const std::vector<bool>& kept) {
    const int64_t at = (b * problem.num_heads + h) * problem.seqlen_q + i;
    double sum = 0.0;
    double wanted[kDim] = {};
    for (int64_t j = 0; j < length; ++j) {
      const int64_t row = place(b, length, i, j);
      if (row < 0 || !kept[j / problem.threshold.skip_block]) continue;
      const double p = std::exp(logit(b, h, i, row));
      sum += p;
      for (int d = 0; d < kDim; ++d)
        wanted[d] += p * v[(row * problem.num_kv_heads + h / group) * kDim + d];
    }
    if (sum == 0.0) CHECK(lse[at] == -kInf);
    if (sum > 0.0) CHECK(std::abs(lse[at] - std::log(sum)) < 1e-4);
    for (int d = 0; d < kDim; ++d)
      CHECK(std::abs(out[at * kDim + d] - (sum > 0.0 ? wanted[d] / sum : 0.0)) < 1e-4);
  }

  std::mt19937 rng;
  DecodeProblem problem;
  int64_t group = 1;
  int64_t skipped = 0;
  std::unique_ptr<float[]> q, k, v, out, lse;
  std::vector<float> lambdas;
  std::vector<int32_t> table, lengths;
  std::vector<int64_t> counters;
};

void test_random() {
  int64_t skipped = 0;
  for (uint32_t seed = 0; seed < 150; ++seed) {
    check::context = "seed " + std::to_string(seed);
    Case one(seed);
    one.build();
    one.check_all();
    skipped += one.skipped;
  }
  check::context = "skipped " + std::to_string(skipped);
  CHECK(skipped > 100);
}

void test_refusals() {
  const auto refused = [](auto change) {
    Case one(3);
    one.build();
    change(one.problem);
    try {
      cpu::threshold_decode(one.problem, serial());
    } catch (const InvalidArgument&) {
      return true;
    } catch (const Unsupported&) {
      return true;
    }
    return false;
  };
  check::context = "refusals";
  CHECK(!refused([](DecodeProblem&) {}));
  CHECK(refused([](DecodeProblem& p) { p.seqlen_q = kMaxDecodeRows + 1; }));
  CHECK(refused([](DecodeProblem& p) { p.head_dim = 12; }));
  CHECK(refused([](DecodeProblem& p) { p.num_splits = 0; }));
  CHECK(refused([](DecodeProblem& p) { p.num_splits = kMaxDecodeSplits + 1; }));
  CHECK(refused([](DecodeProblem& p) { p.threshold.skip_block = 100; }));
  CHECK(refused([](DecodeProblem& p) { p.threshold.enabled = false; }));
  CHECK(refused([](DecodeProblem& p) { p.index.heads_per_list = 1; }));
}

}  // namespace

int main() {
  test_random();
  test_refusals();
  return check::finish();
}
