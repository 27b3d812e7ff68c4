// cpu::quantize_blocks: codes within half a step of doubles, scales where they belong, nothing else
// written.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "attnsieve/estimate.h"
#include "attnsieve/launch.h"
#include "check.h"
#include "kernels.h"
#include "threads.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

constexpr int8_t kGuard = 99;

// [B, H, S, D], or packed [T, H, D], of float32.
struct Quantize {
  Quantize(std::vector<int64_t> lengths, bool packed, int64_t heads, int64_t head_dim)
      : lengths(lengths) {
    offsets.push_back(0);
    for (int64_t n : lengths) offsets.push_back(offsets.back() + static_cast<int32_t>(n));
    problem.batch = static_cast<int64_t>(lengths.size());
    problem.num_heads = heads;
    problem.head_dim = head_dim;
    problem.seqlen = packed ? offsets.back() : lengths[0];
    const int64_t rows = problem.seqlen;
    if (packed) {
      problem.cu_seqlens = offsets.data();
      problem.x = {nullptr, 0, head_dim, heads * head_dim};
    } else {
      problem.x = {nullptr, heads * rows * head_dim, rows * head_dim, head_dim};
    }
    x.resize(problem.total_rows() * heads * head_dim);
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0.5f, 3.0f);
    for (float& number : x) number = normal(random);
  }

  void run(int32_t bits, ScaleRows scale_rows, int32_t block_rows, bool smooth) {
    problem.bits = bits;
    problem.scale_rows = scale_rows;
    problem.block_rows = block_rows;
    const int64_t width = problem.head_dim * bits / 8;
    const int64_t per = problem.head_dim;
    problem.codes = {nullptr, problem.x.stride_batch / per * width,
                     problem.x.stride_head / per * width, problem.x.stride_row / per * width};
    codes.assign(x.size() / per * width + 1, kGuard);
    const int64_t lines = problem.num_heads * (problem.cu_seqlens != nullptr ? 1 : problem.batch);
    scales.assign(lines * problem.num_scales() + 1, -7.0f);
    mean.assign(problem.batch * problem.num_heads * per + 1, -7.0f);
    problem.x.data = x.data();
    problem.codes.data = codes.data();
    problem.scales = scales.data();
    problem.mean = smooth ? mean.data() : nullptr;
    cpu::quantize_blocks(problem, threaded<3>());
    CHECK(codes.back() == kGuard && scales.back() == -7.0f && mean.back() == -7.0f);
  }

  float number(int64_t b, int64_t h, int64_t row, int64_t d) const {
    const int64_t first = problem.cu_seqlens != nullptr ? offsets[b] : 0;
    return x[b * problem.x.stride_batch + h * problem.x.stride_head +
             (first + row) * problem.x.stride_row + d];
  }
  int code(int64_t b, int64_t h, int64_t row, int64_t d) const {
    const int64_t first = problem.cu_seqlens != nullptr ? offsets[b] : 0;
    const int8_t* at = codes.data() + b * problem.codes.stride_batch +
                       h * problem.codes.stride_head + (first + row) * problem.codes.stride_row;
    if (problem.bits == 8) return at[d];
    const auto byte = static_cast<uint8_t>(at[d / 32 * 16 + d % 16]);
    const int nibble = d % 32 < 16 ? byte >> 4 : byte & 15;
    return nibble < 8 ? nibble : nibble - 16;
  }
  float scale(int64_t b, int64_t h, int64_t row) const {
    const ScaleLayout layout = scale_layout(problem.scale_rows, problem.block_rows);
    const bool packed = problem.cu_seqlens != nullptr;
    const int64_t line = packed ? h : b * problem.num_heads + h;
    const int64_t first = packed ? offsets[b] / layout.rows + b : 0;
    return scales[line * problem.num_scales() + (first + row / layout.rows) * layout.scales +
                  layout.scale_of(problem.scale_rows, static_cast<int32_t>(row % layout.rows))];
  }

  // Every code is the nearest, with the mean in doubles.
  void check_codes() const {
    const int largest = largest_code(problem.bits);
    int greatest = 0;
    for (int64_t b = 0; b < problem.batch; ++b) {
      const int64_t rows = problem.cu_seqlens != nullptr ? lengths[b] : problem.seqlen;
      for (int64_t h = 0; h < problem.num_heads; ++h) {
        for (int64_t d = 0; d < problem.head_dim; ++d) {
          double sum = 0.0;
          for (int64_t row = 0; row < rows; ++row) sum += number(b, h, row, d);
          const double center = problem.mean == nullptr || rows == 0 ? 0.0 : sum / rows;
          for (int64_t row = 0; row < rows; ++row) {
            const double y = number(b, h, row, d) - center;
            const double step = scale(b, h, row);
            CHECK(std::fabs(y - code(b, h, row, d) * step) <= 0.5 * step + 1e-4);
            greatest = std::max(greatest, std::abs(code(b, h, row, d)));
          }
        }
      }
    }
    CHECK(greatest == largest);
  }

  QuantizeProblem problem;
  std::vector<int64_t> lengths;
  std::vector<int32_t> offsets;
  std::vector<float> x, scales, mean;
  std::vector<int8_t> codes;
};

void codes_are_nearest() {
  for (const bool packed : {false, true}) {
    for (const int32_t bits : {8, 4}) {
      Quantize quantize(
          packed ? std::vector<int64_t>{70, 0, 5, 300} : std::vector<int64_t>{150, 150}, packed, 3,
          64);
      for (const int32_t block : {1, 32, 128}) {
        quantize.run(bits, ScaleRows::kBlock, block, true);
        quantize.check_codes();
      }
      quantize.run(bits, ScaleRows::kQueryPairs, 1, false);
      quantize.check_codes();
      quantize.run(bits, ScaleRows::kKeyQuads, 1, true);
      quantize.check_codes();
    }
  }
}

void numbers_that_are_not_finite_keep_to_their_scale() {
  Quantize quantize({64}, false, 1, 8);
  quantize.x[20 * 8 + 3] = std::numeric_limits<float>::infinity();
  quantize.run(8, ScaleRows::kBlock, 16, true);
  for (int64_t row = 0; row < 64; ++row) {
    CHECK(std::isnan(quantize.scale(0, 0, row)) == (row / 16 == 1));
    if (row / 16 == 1) CHECK(quantize.code(0, 0, row, 0) == 0);
  }
}

void threads_do_not_matter() {
  Quantize quantize({1000, 3, 400}, true, 2, 32);
  quantize.run(8, ScaleRows::kKeyQuads, 1, true);
  const auto codes = quantize.codes;
  const auto scales = quantize.scales;
  cpu::quantize_blocks(quantize.problem, threaded<1>());
  CHECK(codes == quantize.codes && scales == quantize.scales);
}

void bad_problems_are_refused() {
  const auto refused = [](int32_t bits, int32_t block, const char* what) {
    Quantize quantize({4}, false, 1, 40);
    try {
      quantize.run(bits, ScaleRows::kBlock, block, false);
    } catch (const InvalidArgument& error) {
      return check::contains(error.what(), what);
    }
    return false;
  };
  CHECK(refused(4, 1, "head_dim"));
  CHECK(refused(8, 3, "block_rows"));
  CHECK(refused(5, 1, "bits"));
}

}  // namespace

int main() {
  codes_are_nearest();
  numbers_that_are_not_finite_keep_to_their_scale();
  threads_do_not_matter();
  bad_problems_are_refused();
  return check::finish();
}
