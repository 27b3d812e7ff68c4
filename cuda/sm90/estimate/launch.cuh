// EstimateProblem -> tensor map, grid, the instantiation for its units and blocks.
#pragma once

#include <string>
#include <vector>

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/tensor_map.h"
#include "cuda/sm90/estimate/kernel.cuh"

namespace attnsieve::sm90 {

template <class Config>
void launch_one(const EstimateProblem& problem, void* stream) {
  EstimateArguments a;
  a.problem = problem;
  const CodedRows& k = problem.k;
  if (k.bits == 8) {
    cuda::TensorMapShape shape;
    shape.rank = 5;
    shape.sizes = {Config::kSliceBytes, problem.is_packed() ? problem.total_k : problem.num_keys(),
                   Config::kSlices, problem.num_kv_heads, problem.is_packed() ? 1 : problem.batch};
    shape.strides = {1, k.codes.stride_row, Config::kSliceBytes, k.codes.stride_head,
                     k.codes.stride_batch};
    shape.box = {Config::kSliceBytes, Config::kTileKeys, 1, 1, 1};
    a.keys = cuda::make_byte_map(k.codes.data, shape);
  }
  const int64_t group = problem.num_heads / problem.num_kv_heads;
  const int64_t row_sets = (problem.num_q_blocks() + Config::kBlocks - 1) / Config::kBlocks;
  a.cta_sets = static_cast<int32_t>((row_sets * group + Config::kWarps - 1) / Config::kWarps);
  launch<estimate_block_scores_kernel<Config>>(
      "estimate_block_scores", problem.batch * problem.num_kv_heads * a.cta_sets, Config::kThreads,
      sizeof(typename Config::SharedStorage), stream, a);
}

// f(config) of the configuration for a unit of keys and the sampled rows of a q-block.
template <int kHeadDim, int kUnitKeys, class F>
void with_blocks(int block_rows, F&& f) {
  switch (block_rows) {
    case 8: return f(EstimateConfig<kHeadDim, kUnitKeys, 8>{});
    case 16: return f(EstimateConfig<kHeadDim, kUnitKeys, 16>{});
    case 32: return f(EstimateConfig<kHeadDim, kUnitKeys, 32>{});
    case 64: return f(EstimateConfig<kHeadDim, kUnitKeys, 64>{});
  }
}

template <int kHeadDim>
void launch_estimate_block_scores(const EstimateProblem& problem, void* stream) {
  const bool small = problem.block_k == 16 ||
                     (problem.k.scale_rows == ScaleRows::kBlock && problem.k.block_rows == 16);
  const auto run = [&](auto config) { launch_one<decltype(config)>(problem, stream); };
  const int block_rows = problem.block_q / problem.row_stride;
  if (small) return with_blocks<kHeadDim, 16>(block_rows, run);
  with_blocks<kHeadDim, 32>(block_rows, run);
}

template <int kHeadDim>
std::vector<KernelEntry> estimate_block_scores_entries() {
  std::vector<KernelEntry> entries;
  const auto add = [&](auto config) {
    using Config = decltype(config);
    const std::string name = "hd" + std::to_string(kHeadDim) + " units of " +
                             std::to_string(Config::kUnitKeys) + ", " +
                             std::to_string(Config::kBlockRows) + " rows";
    entries.push_back({name, reinterpret_cast<const void*>(estimate_block_scores_kernel<Config>),
                       Config::kThreads, sizeof(typename Config::SharedStorage)});
  };
  for (const int block_rows : {8, 16, 32, 64}) {
    with_blocks<kHeadDim, 16>(block_rows, add);
    with_blocks<kHeadDim, 32>(block_rows, add);
  }
  return entries;
}

}  // namespace attnsieve::sm90
