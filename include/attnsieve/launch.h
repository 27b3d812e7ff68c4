// Entry points of the backends. CUDA entry points enqueue on `stream` and return; they never
// synchronise, allocate or read device memory. CPU entry points return when the result is written.
#pragma once

#include <cstddef>

#include "attnsieve/estimate.h"
#include "attnsieve/problem.h"

namespace attnsieve {

// Runs body(begin, end) over disjoint chunks that cover [0, items), possibly in parallel. Bodies
// must not throw.
struct ParallelFor {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t items, Body body, void* context) = nullptr;

  template <class F>
  void operator()(int64_t items, F&& f) const {
    auto call = [](void* context, int64_t begin, int64_t end) {
      (*static_cast<F*>(context))(begin, end);
    };
    run(items, call, &f);
  }
};

namespace cpu {
void attend(const AttendProblem& problem, const ParallelFor& parallel_for);
void decode(const DecodeProblem& problem, const ParallelFor& parallel_for);
void threshold_decode(const DecodeProblem& problem, const ParallelFor& parallel_for);
void proxy_scores(const ProxyScoresProblem& problem, const ParallelFor& parallel_for);
void append_kv(const AppendKvProblem& problem, const ParallelFor& parallel_for);
void merge_states(const MergeProblem& problem, const ParallelFor& parallel_for);
void select_blocks(const SelectProblem& problem, const ParallelFor& parallel_for);
void select_tokens(const TokenSelectProblem& problem, const ParallelFor& parallel_for);
void quantize_blocks(const QuantizeProblem& problem, const ParallelFor& parallel_for);
void estimate_block_scores(const EstimateProblem& problem, const ParallelFor& parallel_for);
}  // namespace cpu

namespace cuda {
// Device memory that lets attend balance uneven work. Without it the result is the same, later.
size_t attend_workspace_bytes(const AttendProblem& problem);
// `stream` is a cudaStream_t of the current device.
void attend(const AttendProblem& problem, void* stream);
// Device memory for the results of parts of a list.
size_t decode_workspace_bytes(const DecodeProblem& problem);
void decode(const DecodeProblem& problem, void* stream);
// Device memory for the results of splits.
size_t threshold_decode_workspace_bytes(const DecodeProblem& problem);
void threshold_decode(const DecodeProblem& problem, void* stream);
// Device memory that a softmax needs.
size_t proxy_scores_workspace_bytes(const ProxyScoresProblem& problem);
void proxy_scores(const ProxyScoresProblem& problem, void* stream);
void append_kv(const AppendKvProblem& problem, void* stream);
void merge_states(const MergeProblem& problem, void* stream);
void select_blocks(const SelectProblem& problem, void* stream);
// Device memory that lets several thread blocks share a long list. Without it one owns each list.
size_t select_tokens_workspace_bytes(const TokenSelectProblem& problem);
void select_tokens(const TokenSelectProblem& problem, void* stream);
// Device memory for the sums that a mean needs.
size_t quantize_workspace_bytes(const QuantizeProblem& problem);
void quantize_blocks(const QuantizeProblem& problem, void* stream);
void estimate_block_scores(const EstimateProblem& problem, void* stream);
}  // namespace cuda

}  // namespace attnsieve
