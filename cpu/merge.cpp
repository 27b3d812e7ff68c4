// cpu::merge_states: combines partial attention results by their log-sum-exp.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "kernels.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kChunk = 256;  // elements of a row merged at a time, on the stack

// NaN wins over everything.
float max_lse(const MergeProblem& problem, int64_t row) {
  float max = -kInfinity;
  for (int64_t n = 0; n < problem.num_states; ++n) {
    const float lse = problem.lses[n * problem.rows + row];
    if (std::isnan(lse)) return lse;
    max = std::max(max, lse);
  }
  return max;
}

void merge_row(const MergeProblem& problem, const Kernels& kernels, int64_t row) {
  const float max = max_lse(problem, row);
  double sum = 0.0;
  for (int64_t n = 0; n < problem.num_states; ++n) {
    const double lse = problem.lses[n * problem.rows + row];
    if (lse != -kInfinity) sum += std::exp(lse - max);
  }
  problem.lse[row] = std::isinf(max) ? max : static_cast<float>(max + std::log(sum));

  const int64_t size = element_size(problem.dtype);
  const char* outs = static_cast<const char*>(problem.outs);
  char* out = static_cast<char*>(problem.out);
  for (int64_t d = 0; d < problem.head_dim; d += kChunk) {
    const int64_t count = std::min(kChunk, problem.head_dim - d);
    float merged[kChunk] = {};
    float state[kChunk];
    for (int64_t n = 0; n < problem.num_states; ++n) {
      const double lse = problem.lses[n * problem.rows + row];
      if (lse == -kInfinity) continue;  // saw nothing: its out may be anything
      const float weight = static_cast<float>(std::exp(lse - max) / sum);
      const int64_t offset = (n * problem.rows + row) * problem.head_dim + d;
      kernels.widen(outs + offset * size, problem.dtype, 0, 1, count, state);
      for (int64_t i = 0; i < count; ++i) merged[i] += weight * state[i];
    }
    kernels.narrow(merged, problem.dtype, count, out + (row * problem.head_dim + d) * size);
  }
}

}  // namespace

void merge_states(const MergeProblem& problem, const ParallelFor& parallel_for) {
  if (problem.num_states < 0 || problem.rows < 0 || problem.head_dim < 0) {
    throw InvalidArgument("merge_states: sizes must not be negative");
  }
  if (problem.rows == 0) return;
  const Kernels& widest = kernels();
  parallel_for(problem.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) merge_row(problem, widest, row);
  });
}

}  // namespace attnsieve::cpu
