// What must not reach a row: unselected keys, padding, NaN of keys the row does not see, other
// rows' values.
#include <cmath>
#include <cstring>
#include <limits>

#include "attend_case.h"
#include "check.h"
#include "threads.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// Every key that no row attends to becomes NaN or Inf: not one bit of the result may change.
void poison_unselected() {
  for (uint32_t seed = 1; seed <= 24; ++seed) {
    AttendCase c;
    c.batch = 2;
    c.num_heads = 4;
    c.num_kv_heads = 2;
    c.seqlen_q = 65 + seed * 7;
    c.seqlen_k = 150 + seed * 5;
    c.head_dim = 32;
    c.dtype = static_cast<DType>(seed % 3);
    c.indexed = seed % 4 != 0;
    c.density = 0.25;
    c.list_heads = 2;
    c.mask.causal = seed % 2 == 0;
    if (seed % 4 == 0) c.mask.window_left = 9;
    c.malformed_lists = seed % 5 == 0;
    if (seed % 3 == 0) c.threshold = 0.3f;
    c.seed = seed;
    AttendData data(c);
    const Expected expected = expected_of(data);
    for (const cpu::Kernels* kernels : all_kernels()) {
      AttendData clean(c);
      AttendData dirty(c);
      for (size_t i = 0; i < expected.attended.size(); ++i) {
        if (expected.attended[i] || c.threshold)
          continue;  // a skipped tile's keys do take part in the vote
        for (int64_t d = 0; d < c.head_dim; ++d) {
          dirty.k.values[i * c.head_dim + d] = i % 2 ? kNan : kInf;
          dirty.v.values[i * c.head_dim + d] = i % 3 ? kNan : -kInf;
        }
      }
      if (c.threshold) {
        // Values of skipped tiles are never read.
        for (size_t i = 0; i < expected.attended.size(); ++i) {
          if (!expected.attended[i]) dirty.v.values[i * c.head_dim] = kNan;
        }
      }
      dirty.upload(dirty.k);
      dirty.upload(dirty.v);
      clean.run(*kernels, serial());
      dirty.run(*kernels, serial());
      check::context = std::string(kernels->name) + " " + clean.spec.describe();
      CHECK(clean.out.storage == dirty.out.storage);
      CHECK(std::memcmp(clean.lse.data(), dirty.lse.data(), clean.lse.size() * sizeof(float)) == 0);
      CHECK(clean.counters == dirty.counters);
    }
  }
}

// A poisoned key or value inside a visited tile reaches exactly the rows that see it.
void poison_reaches_only_rows_that_see_it() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t key : {0, 5, 63, 64, 100, 150}) {
      for (float poison : {kNan, kInf, -kInf}) {
        for (bool in_value : {true, false}) {
          AttendCase c;
          c.seqlen_q = c.seqlen_k = 151;
          c.head_dim = 16;
          c.dtype = dtype;
          c.mask.causal = true;
          c.mask.window_left = 70;
          for (const cpu::Kernels* kernels : all_kernels()) {
            AttendData clean(c);
            AttendData dirty(c);
            clean.run(*kernels, serial());
            (in_value ? dirty.v : dirty.k).at(0, 0, key, 3) = poison;
            dirty.upload(in_value ? dirty.v : dirty.k);
            dirty.run(*kernels, serial());
            check::context =
                std::string(kernels->name) + " " + c.describe() + " key " + std::to_string(key);
            bool untouched = true;
            bool reached = true;
            for (int64_t row = 0; row < c.seqlen_q; ++row) {
              const bool sees = key <= row && key >= row - 70;
              for (int64_t d = 0; d < c.head_dim; ++d) {
                const float got = dirty.out.at(0, 0, row, d);
                const float before = clean.out.at(0, 0, row, d);
                if (!sees) untouched = untouched && got == before;
                if (sees && in_value)
                  reached = reached && (d == 3 ? !std::isfinite(got) : std::isfinite(got));
                if (sees && !in_value && std::isnan(poison)) reached = reached && std::isnan(got);
              }
            }
            CHECK(untouched);
            CHECK(reached);
          }
        }
      }
    }
  }
}

void poisoned_query_row_stays_alone() {
  AttendCase c;
  c.seqlen_q = 70;
  c.seqlen_k = 200;
  for (const cpu::Kernels* kernels : all_kernels()) {
    AttendData clean(c);
    AttendData dirty(c);
    dirty.q.at(0, 0, 17, 0) = kNan;
    dirty.upload(dirty.q);
    clean.run(*kernels, serial());
    dirty.run(*kernels, serial());
    bool others = true;
    for (int64_t row = 0; row < c.seqlen_q; ++row) {
      for (int64_t d = 0; d < c.head_dim; ++d) {
        others = others && (row == 17 || clean.out.at(0, 0, row, d) == dirty.out.at(0, 0, row, d));
      }
    }
    check::context = kernels->name;
    CHECK(others);
    CHECK(std::isnan(dirty.out.at(0, 0, 17, 5)));
    CHECK(std::isnan(dirty.lse[17]));
  }
}

// Any finite logit beats a masked one, however low.
void extreme_logits() {
  for (float scale : {6e4f, 2.45e5f, 524288.0f, 1e30f}) {
    AttendCase c;
    c.seqlen_q = 20;
    c.seqlen_k = 90;
    c.head_dim = 8;
    c.mask.causal = true;
    for (const cpu::Kernels* kernels : all_kernels()) {
      AttendData data(c);
      for (float& x : data.q.values) x = scale;
      for (float& x : data.k.values) x = -1.0f;
      data.upload(data.q);
      data.upload(data.k);
      data.run(*kernels, serial());
      check::context = kernels->name + std::string(" logits ") + std::to_string(-scale);
      double mean = 0.0;  // all logits equal: the mean of the visible values
      for (int64_t key = 0; key <= 70; ++key) mean += data.v.at(0, 0, key, 2) / 71.0;
      CHECK(std::abs(data.out.at(0, 0, 0, 2) - mean) < 1e-5);
      CHECK(std::isfinite(data.lse[0]) && data.lse[0] < 0.0f);
    }
  }
}

void sink_extremes() {
  AttendCase c;
  c.seqlen_k = 40;
  c.sink = true;
  for (float sink : {-kInf, -1e30f, 0.0f, 200.0f, 1e30f}) {
    AttendData data(c);
    data.sink[0] = sink;
    const Expected expected = expected_of(data);
    for (const cpu::Kernels* kernels : all_kernels()) {
      data.run(*kernels, serial());
      check::context = kernels->name + std::string(" sink ") + std::to_string(sink);
      CHECK(std::abs(data.lse[3] - expected.lse[3]) <= 1e-6 * std::abs(expected.lse[3]) + 4e-6);
      CHECK(std::abs(data.out.values[77] - expected.out[77]) < 4e-6);
    }
  }
}

}  // namespace

int main() {
  poison_unselected();
  poison_reaches_only_rows_that_see_it();
  poisoned_query_row_stays_alone();
  extreme_logits();
  sink_extremes();
  return check::finish();
}
