// cpu::decode against a double loop, over allocations of their exact size: with sanitizers, a bad
// entry, page or length that is followed is an error here.
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

struct Case {
  explicit Case(uint32_t seed) : rng(seed) {}

  std::unique_ptr<float[]> random(int64_t count) {
    std::normal_distribution<float> normal;
    std::unique_ptr<float[]> data(new float[std::max<int64_t>(1, count)]);
    for (int64_t i = 0; i < count; ++i) data[i] = normal(rng);
    return data;
  }

  int32_t id_below(int32_t limit) {
    if (rng() % 6 == 0) return kBadIds[rng() % 5];
    return limit > 0 ? static_cast<int32_t>(rng() % limit) : -1;
  }

  void build() {
    problem.batch = 1 + rng() % 2;
    problem.num_kv_heads = 1 + rng() % 3;
    const int64_t group = 1 + rng() % 12;
    problem.num_heads = problem.num_kv_heads * group;
    problem.seqlen_q = 1 + rng() % kMaxDecodeRows;
    problem.head_dim = kDim;
    problem.softmax_scale = 0.4f;
    problem.causal = rng() % 4 != 0;
    const int64_t rows = problem.num_heads * problem.seqlen_q;
    q = random(problem.batch * rows * kDim);
    out = random(problem.batch * rows * kDim);
    lse = random(problem.batch * rows);
    problem.q = {q.get(), rows * kDim, problem.seqlen_q * kDim, kDim};
    problem.out = {out.get(), rows * kDim, problem.seqlen_q * kDim, kDim};
    problem.lse = {lse.get(), rows, problem.seqlen_q, 1};

    PagedKv& paged = problem.paged;
    paged.page_size = 1 + rng() % 20;
    paged.num_pages = 1 + rng() % 12;
    paged.max_pages = rng() % 8;
    paged.table_stride_batch = paged.max_pages;
    for (int64_t i = 0; i < problem.batch * paged.max_pages; ++i)
      table.push_back(id_below(static_cast<int32_t>(paged.num_pages)));
    table.shrink_to_fit();
    problem.seqlen_k = paged.capacity();
    for (int64_t b = 0; b < problem.batch; ++b)
      lengths.push_back(id_below(static_cast<int32_t>(paged.capacity()) + 1));
    paged.block_table = table.data() ? table.data() : lengths.data();
    paged.seq_lens = lengths.data();
    const int64_t row = problem.num_kv_heads * kDim;
    k = random(paged.num_pages * paged.page_size * row);
    v = random(paged.num_pages * paged.page_size * row);
    problem.k = {k.get(), paged.page_size * row, kDim, row};
    problem.v = {v.get(), paged.page_size * row, kDim, row};
    if (rng() % 4 != 0) build_index();
  }

  void build_index() {
    TokenIndexView& index = problem.index;
    const int64_t choices[] = {1, problem.num_kv_heads, problem.num_heads};
    const int64_t lists = choices[rng() % 3];
    index.heads_per_list = static_cast<int32_t>(problem.num_heads / lists);
    index.num_rows = rng() % 2 == 0 ? 1 : static_cast<int32_t>(problem.seqlen_q);
    index.capacity = static_cast<int32_t>(rng() % 90);
    index.page_size = rng() % 2 == 0 ? 1 : 1 + rng() % 30;
    index.physical = index.page_size == 1 && rng() % 3 == 0;
    const int64_t slots = problem.paged.num_pages * problem.paged.page_size;
    const int64_t limit = index.physical ? slots : problem.seqlen_k / index.page_size + 1;
    const int64_t all = problem.batch * index.num_rows * lists;
    for (int64_t i = 0; i < all * index.capacity; ++i)
      entries.push_back(id_below(static_cast<int32_t>(limit)));
    for (int64_t i = 0; i < all; ++i) counts.push_back(id_below(index.capacity + 1));
    entries.shrink_to_fit();
    counts.shrink_to_fit();
    index.indices = entries.data();
    index.counts = counts.data();
    index.counts_stride_head = 1;
    index.counts_stride_row = index.num_rows > 1 ? lists : 0;
    index.counts_stride_batch = index.num_rows * lists;
    index.indices_stride_head = index.capacity;
    index.indices_stride_row = index.counts_stride_row * index.capacity;
    index.indices_stride_batch = index.counts_stride_batch * index.capacity;
    if (rng() % 2 == 0) problem.recent = rng() % 20;
    if (rng() % 2 == 0) {
      for (int64_t b = 0; b < problem.batch; ++b) begins.push_back(id_below(100));
      problem.dense_begin = begins.data();
    }
  }

  // Offsets of the keys that a row attends to, in rows of the cache.
  std::vector<int64_t> keys_of(int64_t b, int64_t h, int64_t i) const {
    const PagedKv& paged = problem.paged;
    const TokenIndexView& index = problem.index;
    const int64_t length = std::max<int64_t>(0, std::min<int64_t>(lengths[b], problem.seqlen_k));
    const int64_t end = problem.causal ? length - problem.seqlen_q + i + 1 : length;
    int64_t begin = index.given() ? length : 0;
    if (!begins.empty()) begin = std::min<int64_t>(begin, std::max(0, begins[b]));
    if (problem.recent > 0) begin = std::min(begin, std::max<int64_t>(0, length - problem.recent));
    std::vector<int64_t> keys;
    const auto add = [&](int64_t j) {
      if (j >= end) return;
      const int64_t page = table[b * paged.max_pages + j / paged.page_size];
      if (page >= 0 && page < paged.num_pages)
        keys.push_back(page * paged.page_size + j % paged.page_size);
    };
    if (index.given()) {
      const int64_t list = h / index.heads_per_list;
      const int64_t line = b * index.counts_stride_batch + i * index.counts_stride_row + list;
      for (int64_t s = 0; s < std::min(counts[line], index.capacity); ++s) {
        const int64_t entry = entries[line * index.capacity + s];
        if (entry < 0) continue;
        if (index.physical) {
          if (entry < paged.num_pages * paged.page_size) keys.push_back(entry);
          continue;
        }
        for (int64_t j = 0; j < index.page_size; ++j)
          if (entry * index.page_size + j < begin) add(entry * index.page_size + j);
      }
    }
    for (int64_t j = begin; j < end; ++j) add(j);
    return keys;
  }

  void check_all() {
    cpu::decode(problem, threaded<3>());
    for (int64_t b = 0; b < problem.batch; ++b)
      for (int64_t h = 0; h < problem.num_heads; ++h)
        for (int64_t i = 0; i < problem.seqlen_q; ++i) check_row(b, h, i);
  }

  void check_row(int64_t b, int64_t h, int64_t i) const {
    const int64_t row = (b * problem.num_heads + h) * problem.seqlen_q + i;
    const int64_t kv_head = h / (problem.num_heads / problem.num_kv_heads);
    double sum = 0.0;
    double wanted[kDim] = {};
    for (int64_t key : keys_of(b, h, i)) {
      const int64_t offset = (key * problem.num_kv_heads + kv_head) * kDim;
      double logit = 0.0;
      for (int d = 0; d < kDim; ++d) logit += double{q[row * kDim + d]} * k[offset + d];
      const double p = std::exp(logit * problem.softmax_scale);
      sum += p;
      for (int d = 0; d < kDim; ++d) wanted[d] += p * v[offset + d];
    }
    if (sum == 0.0) CHECK(lse[row] == -kInf);
    if (sum > 0.0) CHECK(std::abs(lse[row] - std::log(sum)) < 1e-4);
    for (int d = 0; d < kDim; ++d)
      CHECK(std::abs(out[row * kDim + d] - (sum > 0.0 ? wanted[d] / sum : 0.0)) < 1e-4);
  }

  std::mt19937 rng;
  DecodeProblem problem;
  std::unique_ptr<float[]> q, k, v, out, lse;
  std::vector<int32_t> table, lengths, entries, counts, begins;
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
      cpu::decode(one.problem, serial());
    } catch (const InvalidArgument&) {
      return true;
    } catch (const Unsupported&) {
      return true;
    }
    return false;
  };
  check::context = "refusals";
  CHECK(refused([](DecodeProblem& p) { p.seqlen_q = kMaxDecodeRows + 1; }));
  CHECK(refused([](DecodeProblem& p) { p.head_dim = 12; }));
  CHECK(refused([](DecodeProblem& p) { p.num_kv_heads = 0; }));
  CHECK(refused([](DecodeProblem& p) { p.index.heads_per_list = 1, p.index.page_size = 0; }));
}

}  // namespace

int main() {
  test_random();
  test_refusals();
  return check::finish();
}
