// What both decode ops do on the host before they pick a kernel.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/common/cuda_check.h"
#include "cuda/sm80/decode/arguments.h"

namespace attnsieve::cuda {

// Partial results of chunks, then the counters. Items of one chunk leave nothing.
struct DecodeWorkspace {
  DecodeWorkspace(const DecodePlan& plan, int64_t head_dim) {
    if (plan.max_chunks == 1 || plan.ranks > 0) return;
    const auto aligned = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
    const size_t columns = size_t{1} * plan.items * plan.max_chunks * plan.columns;
    state = aligned(columns * head_dim * sizeof(float));
    arrivals = state + aligned(columns * sizeof(float2));
    bytes = arrivals + plan.items * sizeof(unsigned);
  }
  size_t state = 0;  // offsets; partial outputs are at 0
  size_t arrivals = 0;
  size_t bytes = 0;
};

inline bool is_empty(const DecodeProblem& problem) {
  return problem.batch == 0 || problem.seqlen_q == 0 || problem.num_heads == 0;
}

// Lays out the workspace, and zeroes its counters on `stream`.
inline sm80::DecodeArguments decode_arguments(const std::string& op, const DecodeProblem& problem,
                                              const DecodePlan& plan, void* stream) {
  sm80::DecodeArguments arguments{};
  arguments.problem = problem;
  arguments.plan = plan;
  if (problem.index.given()) {
    arguments.index_page = cutlass::FastDivmod(static_cast<int>(problem.index.page_size));
  }
  if (problem.paged.block_table != nullptr) {
    arguments.cache_page = cutlass::FastDivmod(problem.paged.page_size);
  }
  const DecodeWorkspace workspace(plan, problem.head_dim);
  if (workspace.bytes > 0) {
    auto* const base = static_cast<char*>(problem.workspace);
    if (base == nullptr) throw InvalidArgument(op + ": the problem needs a workspace");
    arguments.partial_out = reinterpret_cast<float*>(base);
    arguments.partial_state = reinterpret_cast<float2*>(base + workspace.state);
    arguments.arrivals = reinterpret_cast<unsigned*>(base + workspace.arrivals);
    check_cuda(cudaMemsetAsync(arguments.arrivals, 0, workspace.bytes - workspace.arrivals,
                               static_cast<cudaStream_t>(stream)),
               (op + ": zero the counters").c_str());
  }
  return arguments;
}

}  // namespace attnsieve::cuda
