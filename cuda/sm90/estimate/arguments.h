// What the host hands the sm_90 estimator.
#pragma once

#include <cuda.h>

#include <vector>

#include "attnsieve/estimate.h"
#include "cuda/dispatch/kernel_table.h"

namespace attnsieve::sm90 {

struct EstimateArguments {
  EstimateProblem problem;
  // Of 8-bit codes: (bytes of a slice, rows, slices, heads, batch), box: 128 rows of a slice.
  CUtensorMap keys;
  int32_t cta_sets;  // (64 sampled rows, query head) pairs of a KV head, in eights
};

// Whether the kernel takes the problem; the others are sm_80's.
inline bool serves(const EstimateProblem& problem) {
  return problem.reduce == EstimateReduce::kMax && problem.head_dim <= 128 &&
         problem.block_q / problem.row_stride <= 64;
}

template <int kHeadDim>
void launch_estimate_block_scores(const EstimateProblem& problem, void* stream);
template <int kHeadDim>
std::vector<KernelEntry> estimate_block_scores_entries();

}  // namespace attnsieve::sm90
