// EstimateProblem -> grid, shared memory, launch; and the entries of the kernel table.
#pragma once

#include <string>
#include <vector>

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm80/estimate/kernel.cuh"

namespace attnsieve::sm80 {

// f(config) of the kernel for codes of `key_bits` and what is reduced.
template <int kHeadDim, class F>
void with_estimate_config(int32_t key_bits, EstimateReduce reduce, F&& f) {
  const bool sum = reduce == EstimateReduce::kSum;
  if (key_bits == 8) {
    return sum ? f(EstimateConfig<kHeadDim, 8, true>{}) : f(EstimateConfig<kHeadDim, 8, false>{});
  }
  return sum ? f(EstimateConfig<kHeadDim, 4, true>{}) : f(EstimateConfig<kHeadDim, 4, false>{});
}

template <int kHeadDim>
void launch_estimate_block_scores(const EstimateProblem& problem, void* stream) {
  with_estimate_config<kHeadDim>(problem.k.bits, problem.reduce, [&](auto config) {
    using Config = decltype(config);
    const int64_t blocks = Config::kRows / (problem.block_q / problem.row_stride);
    const int64_t row_tiles = (problem.num_q_blocks() + blocks - 1) / blocks;
    launch<estimate_block_scores_kernel<Config>>(
        "estimate_block_scores", problem.batch * problem.num_heads * row_tiles, Config::kThreads,
        sizeof(typename Config::SharedStorage), stream, problem);
  });
}

template <int kHeadDim>
std::vector<KernelEntry> estimate_block_scores_entries() {
  std::vector<KernelEntry> entries;
  for (const int32_t key_bits : {8, 4}) {
    for (const EstimateReduce reduce : {EstimateReduce::kMax, EstimateReduce::kSum}) {
      with_estimate_config<kHeadDim>(key_bits, reduce, [&](auto config) {
        using Config = decltype(config);
        const std::string name = "hd" + std::to_string(kHeadDim) + " " + std::to_string(key_bits) +
                                 " bits" + (Config::kSum ? ", sums" : "");
        entries.push_back({name,
                           reinterpret_cast<const void*>(estimate_block_scores_kernel<Config>),
                           Config::kThreads, sizeof(typename Config::SharedStorage)});
      });
    }
  }
  return entries;
}

}  // namespace attnsieve::sm80
