// cpu::estimate_block_scores: against integers and doubles, pair by pair.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "attnsieve/estimate.h"
#include "attnsieve/launch.h"
#include "check.h"
#include "cpu/code_products.h"
#include "threads.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Rows {
  Rows(int64_t batch, int64_t heads, int64_t rows, int64_t head_dim, ScaleRows scale_rows,
       int32_t block_rows, unsigned seed) {
    coded.scale_rows = scale_rows;
    coded.block_rows = block_rows;
    const ScaleLayout layout = coded.layout();
    coded.num_scales = (rows + layout.rows - 1) / layout.rows * layout.scales;
    std::mt19937 random(seed);
    codes.resize(batch * heads * rows * head_dim);
    for (int8_t& code : codes) code = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    scales.resize(batch * heads * coded.num_scales);
    for (float& scale : scales) scale = 0.01f + static_cast<float>(random() % 100) / 1000.0f;
    coded.codes = {codes.data(), heads * rows * head_dim, rows * head_dim, head_dim};
    coded.scales = scales.data();
  }

  CodedRows coded;
  std::vector<int8_t> codes;
  std::vector<float> scales;
};

double scale_of(const CodedRows& rows, int64_t line, int64_t row) {
  const ScaleLayout layout = rows.layout();
  return rows.scales[line * rows.num_scales + row / layout.rows * layout.scales +
                     layout.scale_of(rows.scale_rows, static_cast<int32_t>(row % layout.rows))];
}

void against_doubles(int32_t block_q, int32_t block_k, int32_t stride, bool causal,
                     ScaleRows scale_rows, int64_t head_dim) {
  constexpr int64_t kBatch = 2, kHeads = 4, kKvHeads = 2, kQ = 150, kK = 210;
  Rows q(kBatch, kHeads, kQ, head_dim, ScaleRows::kQueryPairs, 1, 1);
  Rows k(kBatch, kKvHeads, kK, head_dim, scale_rows, 32, 2);
  std::vector<float> threshold(kBatch * kHeads * kQ);
  for (size_t i = 0; i < threshold.size(); ++i) threshold[i] = static_cast<float>(i % 17) / 8;
  EstimateProblem problem;
  problem.q = q.coded;
  problem.k = k.coded;
  problem.threshold = {threshold.data(), kHeads * kQ, kQ, 1};
  problem.batch = kBatch;
  problem.num_heads = kHeads;
  problem.num_kv_heads = kKvHeads;
  problem.seqlen_q = kQ;
  problem.seqlen_k = kK;
  problem.head_dim = head_dim;
  problem.softmax_scale = 0.125f;
  problem.mask.causal = causal;
  problem.block_q = block_q;
  problem.block_k = block_k;
  problem.row_stride = stride;
  const int64_t rows = problem.num_q_blocks();
  const int64_t columns = problem.num_k_blocks();
  std::vector<float> scores(kBatch * kHeads * rows * columns, 7.0f);
  problem.scores = scores.data();
  cpu::estimate_block_scores(problem, threaded<3>());
  std::vector<float> in_floats(scores.size(), 7.0f);
  problem.scores = in_floats.data();
  cpu::estimate_block_scores(problem, threaded<2>(), nullptr);
  CHECK(in_floats == scores);

  std::vector<double> want(scores.size(), -kInfinity);
  for (int64_t line = 0; line < kBatch * kHeads; ++line) {
    const int64_t kv_line = line / kHeads * kKvHeads + line % kHeads / (kHeads / kKvHeads);
    for (int64_t i = 0; i < kQ; i += stride) {
      for (int64_t j = 0; j < kK; ++j) {
        if (causal && j > i + kK - kQ) break;
        int64_t dot = 0;
        for (int64_t d = 0; d < head_dim; ++d)
          dot +=
              q.codes[(line * kQ + i) * head_dim + d] * k.codes[(kv_line * kK + j) * head_dim + d];
        const double value = 0.125 * static_cast<double>(dot) * scale_of(q.coded, line, i) *
                                 scale_of(k.coded, kv_line, j) -
                             threshold[line * kQ + i];
        double& best = want[(line * rows + i / block_q) * columns + j / block_k];
        best = std::max(best, value);
      }
    }
  }
  bool near = true;
  for (size_t i = 0; i < want.size(); ++i) {
    near = near && (want[i] == -kInfinity ? scores[i] == -kInfinity
                                          : std::fabs(scores[i] - want[i]) < 1e-4);
  }
  CHECK(near);

  const int64_t words = (columns + 31) / 32;
  std::vector<uint32_t> bits(kBatch * kHeads * rows * words, 0xffffffffu);
  problem.scores = nullptr;
  problem.bits = bits.data();
  cpu::estimate_block_scores(problem, threaded<1>());
  bool same = true;
  for (int64_t line = 0; line < kBatch * kHeads * rows; ++line) {
    for (int64_t b = 0; b < words * 32; ++b) {
      const bool keep = b < columns && scores[line * columns + b] > 0;
      same = same && (bits[line * words + b / 32] >> (b % 32) & 1u) == keep;
    }
  }
  CHECK(same);
}

void bad_problems_are_refused() {
  const auto refused = [](auto&& change, const char* what) {
    EstimateProblem problem;
    problem.num_heads = 1;
    problem.k.block_rows = 16;
    change(problem);
    try {
      cpu::estimate_block_scores(problem, serial());
    } catch (const InvalidArgument& error) {
      return check::contains(error.what(), what);
    }
    return false;
  };
  CHECK(refused([](EstimateProblem& p) { p.block_q = 32; }, "block_q"));
  CHECK(refused([](EstimateProblem& p) { p.block_k = 8; }, "block_k"));
  CHECK(refused([](EstimateProblem& p) { p.row_stride = 3; }, "row_stride"));
  CHECK(refused([](EstimateProblem& p) { p.k.block_rows = 8; }, "scales of k"));
  CHECK(
      refused([](EstimateProblem& p) { p.k.scale_rows = ScaleRows::kQueryPairs; }, "scales of k"));
}

}  // namespace

int main() {
  for (const int32_t stride : {1, 4}) {
    for (const int32_t block_k : {16, 128}) {
      for (const bool causal : {false, true}) {
        against_doubles(64, block_k, stride, causal, ScaleRows::kKeyQuads, 96);
        against_doubles(128, block_k, stride, causal, ScaleRows::kBlock, 50);
      }
    }
  }
  bad_problems_are_refused();
  return check::finish();
}
