// Threshold skipping: results and counters against the sequential definition, and the exact
// equalities it promises.
#include <cmath>
#include <cstring>

#include "attend_case.h"
#include "check.h"
#include "threads.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

AttendCase random_case(uint32_t seed) {
  AttendCase c;
  c.batch = 1 + seed % 2;
  c.num_heads = 2;
  c.num_kv_heads = 1 + (seed / 2) % 2;
  c.seqlen_q = 50 + (seed * 37) % 200;
  c.seqlen_k = 64 + (seed * 91) % 600;
  c.head_dim = 16 + 8 * (seed % 3);
  c.dtype = static_cast<DType>(seed % 3);
  c.mask.causal = seed % 4 == 1;
  if (seed % 7 == 3) c.mask.window_left = 130;
  c.indexed = seed % 2 == 1;
  c.block_q = seed % 3 ? 64 : 128;
  const int block_ks[] = {128, 64, 16, 64, 32};
  c.block_k = block_ks[seed % 5];
  c.density = 0.7;
  c.malformed_lists = seed % 11 == 3;
  c.skip_block = (seed / 2) % 2 ? 64 : 128;
  c.logit_scale = 2.0f;
  c.sink = seed % 6 == 5;
  c.page_size = seed % 4 == 2 ? 48 : 0;
  c.bad_pages = seed % 8 == 2;
  c.seed = seed;
  return c;
}

// Keys of some tiles are shrunk, so that their logits stay low for all 64 rows and skips do happen.
void quieten_some_tiles(AttendData& data) {
  for (int64_t b = 0; b < data.spec.batch; ++b) {
    for (int64_t h = 0; h < data.k.heads; ++h) {
      for (int64_t key = 0; key < data.k.rows; ++key) {
        if ((key / 64 + h) % 3 == 0) continue;
        for (int64_t d = 0; d < data.spec.head_dim; ++d) data.k.at(b, h, key, d) *= 0.1f;
      }
    }
  }
  data.upload(data.k);
}

void counters_and_results() {
  int64_t skipped = 0;
  int64_t total = 0;
  for (uint32_t seed = 1; seed <= 120; ++seed) {
    AttendCase c = random_case(seed);
    const float lambdas[] = {0.9f, 0.2f, 0.5f, 1.0f, 3.0f};
    c.threshold = lambdas[seed % 5];
    AttendData data(c);
    quieten_some_tiles(data);
    const Expected expected = expected_of(data);
    if (expected.smallest_margin < 1e-4) continue;  // decided by rounding
    for (const cpu::Kernels* kernels : all_kernels()) {
      data.run(*kernels, serial());
      check::context = std::string(kernels->name) + " " + data.spec.describe();
      CHECK(data.counters == expected.counters);
      const double rounding = c.dtype == DType::kFloat32   ? 4e-6
                              : c.dtype == DType::kFloat16 ? 5e-4
                                                           : 4e-3;
      bool ok = true;
      for (size_t i = 0; i < expected.out.size(); ++i) {
        ok = ok && std::abs(data.out.values[i] - expected.out[i]) <=
                       rounding * std::abs(expected.out[i]) + 4e-6;
      }
      for (size_t i = 0; i < expected.lse.size(); ++i) {
        ok = ok && (std::isinf(expected.lse[i]) ? data.lse[i] == expected.lse[i]
                                                : std::abs(data.lse[i] - expected.lse[i]) < 1e-5);
      }
      CHECK(ok);
    }
    for (size_t i = 0; i < expected.counters.size(); i += 2) {
      skipped += expected.counters[i];
      total += expected.counters[i + 1];
    }
  }
  check::context = "the cases above skip something, but not everything";
  CHECK(skipped > total / 20 && skipped < total * 9 / 10);
}

void zero_is_bitwise_none() {
  for (uint32_t seed = 200; seed < 230; ++seed) {
    AttendCase c = random_case(seed);
    AttendData none(c);
    c.threshold = 0.0f;
    AttendData zero(c);
    for (const cpu::Kernels* kernels : all_kernels()) {
      none.run(*kernels, serial());
      zero.run(*kernels, threaded<2>());
      check::context = std::string(kernels->name) + " " + zero.spec.describe();
      CHECK(none.out.storage == zero.out.storage);
      CHECK(std::memcmp(none.lse.data(), zero.lse.data(), none.lse.size() * sizeof(float)) == 0);
      CHECK(none.counters == zero.counters);
      for (size_t i = 0; i < zero.counters.size(); i += 2) CHECK(zero.counters[i] == 0);
    }
  }
}

void huge_keeps_only_the_first_tile() {
  AttendCase c;
  c.seqlen_q = 64;
  c.seqlen_k = 640;
  c.threshold = INFINITY;
  AttendData data(c);
  data.run(cpu::kernels(), serial());
  check::context = "lambda infinite";
  CHECK(data.counters[0] == 4 && data.counters[1] == 5);
}

// A NaN logit makes its row veto; a tile that no row sees (all -inf) is no reason to keep it.
void nan_vetoes() {
  AttendCase c;
  c.seqlen_k = 256;
  c.threshold = INFINITY;
  c.skip_block = 64;
  for (const cpu::Kernels* kernels : all_kernels()) {
    AttendData data(c);
    for (int64_t d = 0; d < c.head_dim; ++d) data.k.at(0, 0, 70, d) = NAN;
    data.upload(data.k);
    data.run(*kernels, serial());
    check::context = std::string(kernels->name) + " NaN in tile 1";
    CHECK(data.counters[0] == 1 &&
          data.counters[1] == 4);  // tile 0 skipped; 1 vetoed; then m_run is NaN: 2 too
    CHECK(std::isnan(data.lse[0]));
  }
}

// Rows that see no key at all share the group with rows that would skip: the same block listed
// twice.
void rows_without_keys_never_veto() {
  AttendCase c;
  c.seqlen_k = 32;
  c.mask.causal = true;
  c.indexed = true;
  c.threshold = 2.0f;
  c.skip_block = 64;
  for (const cpu::Kernels* kernels : all_kernels()) {
    AttendData data(c);
    data.counts[0] = 2;
    data.columns[0] = data.columns[1] = 0;
    data.run(*kernels, serial());
    check::context = std::string(kernels->name) + " rows without keys";
    CHECK(data.counters[0] == 1 && data.counters[1] == 2);
    CHECK(data.lse[0] == -INFINITY && std::isfinite(data.lse[63]));
  }
}

// Both groups of a block_q = 128 row share one cut: [0, 1], [3]. Group 0 does not see unit 3, so its
// first visited tile is [0, 1]; group 1 starts with [3] and may skip [0, 1].
void groups_of_a_row_share_the_cut() {
  AttendCase c;
  c.seqlen_q = 128;
  c.seqlen_k = 256;
  c.mask.causal = true;
  c.indexed = true;
  c.block_q = 128;
  c.threshold = INFINITY;
  AttendData data(c);
  data.counts[0] = 3;
  data.columns[0] = 0;
  data.columns[1] = 1;
  data.columns[2] = 3;
  data.run(cpu::kernels(), serial());
  check::context = "one cut for the row";
  CHECK(data.counters == (std::vector<int64_t>{1, 3}));
  const Expected expected = expected_of(data);
  CHECK(data.counters == expected.counters);
}

void own_value_for_each_head() {
  AttendCase c;
  c.num_heads = 2;
  c.seqlen_k = 512;
  c.threshold = 0.0f;
  AttendData data(c);
  data.lambda[1] = INFINITY;
  data.run(cpu::kernels(), serial());
  check::context = "threshold per head";
  CHECK(data.counters == (std::vector<int64_t>{0, 4, 3, 4}));
  data.problem.threshold.per_head = nullptr;
  data.problem.threshold.value = INFINITY;
  data.run(cpu::kernels(), serial());
  CHECK(data.counters == (std::vector<int64_t>{3, 4, 3, 4}));
}

}  // namespace

int main() {
  counters_and_results();
  zero_is_bitwise_none();
  huge_keeps_only_the_first_tile();
  nan_vetoes();
  rows_without_keys_never_veto();
  groups_of_a_row_share_the_cut();
  own_value_for_each_head();
  return check::finish();
}
