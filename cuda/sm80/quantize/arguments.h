// What the host hands the kernels of quantize_blocks.
#pragma once

#include <vector>

#include "attnsieve/estimate.h"
#include "cuda/dispatch/kernel_table.h"

namespace attnsieve::sm80 {

// One level of the sum: rows that stand for `unit` rows of x each become rows that stand for
// kSumRows times as many.
struct SumRowsArguments {
  QuantizeProblem problem;
  int64_t unit = 1;
  const float* source = nullptr;  // [H, packed_chunks(unit), D]; unit 1: x
  float* sums = nullptr;          // [H, packed_chunks(unit * kSumRows), D]; nullptr: the mean
};

// Floats of one level's sums.
inline int64_t level_size(const QuantizeProblem& problem, int64_t unit) {
  return problem.num_heads * packed_chunks(problem.batch, problem.total_rows(), unit) *
         problem.head_dim;
}

template <class Element>
void launch_quantize_blocks(const QuantizeProblem& problem, void* stream);
std::vector<KernelEntry> quantize_blocks_entries();

template <int kHeadDim>
void launch_estimate_block_scores(const EstimateProblem& problem, void* stream);
template <int kHeadDim>
std::vector<KernelEntry> estimate_block_scores_entries();

}  // namespace attnsieve::sm80
