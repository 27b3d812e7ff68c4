// cpu::append_kv against plain loops, over allocations of their exact size: with sanitizers, a row
// that is written outside the cache is an error here. Every other element must stay as it was.
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
#include "cpu/codes.h"
#include "threads.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

constexpr int kDim = 8;
constexpr int kProxyDim = 16;
constexpr int32_t kBadIds[] = {INT32_MIN, -123456, -1, 114514, INT32_MAX};

struct Case {
  explicit Case(uint32_t seed) : rng(seed) {}

  std::vector<float> random(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> data(std::max<int64_t>(1, count));
    for (float& x : data) x = normal(rng);
    return data;
  }

  void build() {
    problem.batch = 1 + rng() % 3;
    problem.num_kv_heads = 1 + rng() % 3;
    problem.seqlen_q = rng() % (rng() % 4 == 0 ? 150 : 9);
    problem.head_dim = kDim;
    PagedKv& pages = problem.pages;
    pages.page_size = 1 + rng() % 20;
    pages.max_pages = rng() % 12;
    pages.num_pages = problem.batch * pages.max_pages + 2;
    pages.table_stride_batch = pages.max_pages;
    for (int32_t i = 0; i < pages.num_pages; ++i) table.push_back(i);
    std::shuffle(table.begin(), table.end(), rng);
    table.resize(std::max<size_t>(1, problem.batch * pages.max_pages));
    for (int32_t& page : table)
      if (rng() % 6 == 0) page = kBadIds[rng() % 5];
    table.shrink_to_fit();
    problem.seqlen_k = pages.capacity();
    for (int64_t b = 0; b < problem.batch; ++b) {
      const int64_t length = rng() % (problem.seqlen_k + 4);
      lengths.push_back(rng() % 6 == 0 ? kBadIds[rng() % 5] : static_cast<int32_t>(length));
    }
    lengths.shrink_to_fit();
    pages.block_table = table.data();
    pages.seq_lens = lengths.data();

    const int64_t heads = problem.num_kv_heads;
    int64_t rows = problem.batch * problem.seqlen_q;
    if (rng() % 2 == 0) {  // packed
      starts.push_back(0);
      for (int64_t b = 0; b < problem.batch; ++b)
        starts.push_back(starts.back() + static_cast<int32_t>(rng() % 9));
      rows = problem.seqlen_q = starts.back();
      problem.cu_seqlens = starts.data();
    }
    k = random(rows * heads * kDim);
    v = random(rows * heads * kDim);
    const int64_t per_batch = starts.empty() ? problem.seqlen_q * heads * kDim : 0;
    problem.k = {k.data(), per_batch, kDim, heads * kDim};
    problem.v = {v.data(), per_batch, kDim, heads * kDim};
    slots = pages.num_pages * pages.page_size;
    for (auto& cache : cached) cache = random(slots * heads * kDim);
    const int64_t page_stride = pages.page_size * heads * kDim;
    problem.k_cache = {cached[0].data(), page_stride, kDim, heads * kDim};
    problem.v_cache = {cached[1].data(), page_stride, kDim, heads * kDim};

    bounds = random(pages.num_pages * heads * 2 * kDim);
    problem.bounds = {bounds.data(), heads * 2 * kDim, 2 * kDim, 0};
    problem.bounds_stride_bound = kDim;
    problem.bounds_page_size = pages.page_size;
    const int64_t proxies = problem.num_proxy_heads = heads * (1 + rng() % 2);
    problem.proxy_dim = kProxyDim;
    projection = random(proxies * kDim * kProxyDim);
    proxy = random(slots * proxies * kProxyDim);
    problem.projection = {projection.data(), 0, kDim * kProxyDim, kProxyDim};
    problem.proxy = {proxy.data(), pages.page_size * proxies * kProxyDim, kProxyDim,
                     proxies * kProxyDim};
  }

  // The slot of a position, or -1.
  int64_t slot_of(int64_t b, int64_t j) const {
    const PagedKv& pages = problem.pages;
    if (j < 0 || j >= problem.seqlen_k) return -1;
    const int64_t page = table[b * pages.max_pages + j / pages.page_size];
    if (page < 0 || page >= pages.num_pages) return -1;
    return page * pages.page_size + j % pages.page_size;
  }

  // What append_kv must do, element by element.
  void append_slowly() {
    const int64_t heads = problem.num_kv_heads;
    for (int64_t b = 0; b < problem.batch; ++b) {
      const int64_t source = starts.empty() ? b * problem.seqlen_q : starts[b];
      const int64_t count = starts.empty() ? problem.seqlen_q : starts[b + 1] - starts[b];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t j = int64_t{lengths[b]} - count + i;
        const int64_t slot = slot_of(b, j);
        if (slot < 0) continue;
        const float* key = k.data() + (source + i) * heads * kDim;
        const float* value = v.data() + (source + i) * heads * kDim;
        std::copy_n(key, heads * kDim, cached[0].data() + slot * heads * kDim);
        std::copy_n(value, heads * kDim, cached[1].data() + slot * heads * kDim);
        for (int64_t p = 0; p < problem.num_proxy_heads; ++p)
          project(key + p * heads / problem.num_proxy_heads * kDim, p, slot);
      }
      for (int64_t i = 0; i < count; ++i) bound(b, int64_t{lengths[b]} - count + i);
    }
  }

  void project(const float* key, int64_t p, int64_t slot) {
    for (int r = 0; r < kProxyDim; ++r) {
      double sum = 0.0;
      for (int d = 0; d < kDim; ++d)
        sum += double{key[d]} * projection[(p * kDim + d) * kProxyDim + r];
      proxy[(slot * problem.num_proxy_heads + p) * kProxyDim + r] = static_cast<float>(sum);
    }
  }

  // Bounds of the page that holds position j.
  void bound(int64_t b, int64_t j) {
    if (slot_of(b, j) < 0) return;
    const int64_t size = problem.pages.page_size;
    const int64_t heads = problem.num_kv_heads;
    const int64_t first = j / size * size;
    const int64_t last = std::min<int64_t>({first + size, lengths[b], problem.seqlen_k});
    const int64_t page = slot_of(b, j) / size;
    for (int64_t i = 0; i < heads * kDim; ++i) {
      float* const to = bounds.data() + (page * heads + i / kDim) * 2 * kDim + i % kDim;
      to[0] = std::numeric_limits<float>::infinity();
      to[kDim] = -to[0];
      for (int64_t other = first; other < last; ++other) {
        const float x = cached[0][slot_of(b, other) * heads * kDim + i];
        to[0] = std::min(to[0], x);
        to[kDim] = std::max(to[kDim], x);
      }
    }
  }

  std::mt19937 rng;
  AppendKvProblem problem;
  int64_t slots = 0;
  std::vector<float> k, v, cached[2], bounds, projection, proxy;
  std::vector<int32_t> table, lengths, starts;
};

void test_random() {
  for (uint32_t seed = 0; seed < 400; ++seed) {
    check::context = "seed " + std::to_string(seed);
    Case one(seed);
    one.build();
    Case expected(seed);
    expected.build();
    cpu::append_kv(one.problem, threaded<3>());
    expected.append_slowly();
    CHECK(one.cached[0] == expected.cached[0]);
    CHECK(one.cached[1] == expected.cached[1]);
    CHECK(one.bounds == expected.bounds);
    bool close = true;
    for (size_t i = 0; i < one.proxy.size(); ++i)
      close = close && std::abs(one.proxy[i] - expected.proxy[i]) < 1e-4;
    CHECK(close);
  }
}

// Every code is the nearest to its own number; between two, the even one.
void test_float8() {
  check::context = "float8";
  for (int code = 0; code < 0x7f; ++code) {
    const float x = cpu::widen_e4m3(static_cast<uint8_t>(code));
    CHECK(cpu::narrow_e4m3(x) == code);
    CHECK(cpu::narrow_e4m3(-x) == (code | 0x80));
    if (code == 0x7e) continue;
    const float next = cpu::widen_e4m3(static_cast<uint8_t>(code + 1));
    const float middle = (x + next) / 2;
    CHECK(x < next);
    CHECK(cpu::narrow_e4m3(middle) == (code % 2 == 0 ? code : code + 1));
    CHECK(cpu::narrow_e4m3(std::nextafter(middle, x)) == code);
    CHECK(cpu::narrow_e4m3(std::nextafter(middle, next)) == code + 1);
  }
  CHECK(cpu::widen_e4m3(0x7e) == 448.0f);
  CHECK(cpu::narrow_e4m3(449.0f) == 0x7e && cpu::narrow_e4m3(1e30f) == 0x7e);
  CHECK(cpu::narrow_e4m3(-std::numeric_limits<float>::infinity()) == 0xfe);
  CHECK(std::isnan(cpu::widen_e4m3(cpu::narrow_e4m3(std::nanf("")))));
}

void test_refusals() {
  const auto refused = [](auto change) {
    Case one(3);
    one.build();
    change(one.problem);
    try {
      cpu::append_kv(one.problem, serial());
    } catch (const InvalidArgument&) {
      return true;
    } catch (const Unsupported&) {
      return true;
    }
    return false;
  };
  check::context = "refusals";
  static const int32_t kBadOffsets[] = {0, 3, 2, 1000};
  CHECK(!refused([](AppendKvProblem&) {}));
  CHECK(refused([](AppendKvProblem& p) { p.head_dim = 12; }));
  CHECK(refused([](AppendKvProblem& p) { p.proxy_dim = 12; }));
  CHECK(refused([](AppendKvProblem& p) { p.code = Code::kInt8; }));
  CHECK(refused([](AppendKvProblem& p) { p.code = Code::kFloat8E4m3; }));
  CHECK(refused([](AppendKvProblem& p) { p.bounds_page_size += 1; }));
  CHECK(refused([](AppendKvProblem& p) { p.batch = 2, p.cu_seqlens = kBadOffsets; }));
}

}  // namespace

int main() {
  test_random();
  test_float8();
  test_refusals();
  return check::finish();
}
