// merge_states and select_blocks on CUDA; refusals of what has no kernel there.
#include "attnsieve/launch.h"
#include "cuda/dispatch/device.h"
#include "cuda/dispatch/instantiations.h"

namespace attnsieve::cuda {

void merge_states(const MergeProblem& problem, void* stream) {
  require_supported("merge_states", Backend::kSm80, problem.dtype, problem.head_dim);
  sm80::launch_merge_states(problem, stream);
}

void select_blocks(const SelectProblem& problem, void* stream) {
  sm80::launch_select_blocks(problem, select_threads(problem.num_k_blocks()), stream);
}

void decode(const DecodeProblem&, void*) {
  throw Unsupported("decode has no CUDA kernel; supported: cpu");
}

void proxy_scores(const ProxyScoresProblem&, void*) {
  throw Unsupported("proxy_scores has no CUDA kernel; supported: cpu");
}

void append_kv(const AppendKvProblem&, void*) {
  throw Unsupported("append_kv has no CUDA kernel; supported: cpu");
}

void select_tokens(const TokenSelectProblem&, void*) {
  throw Unsupported("select_topk and select_threshold have no CUDA kernels; supported: cpu");
}

}  // namespace attnsieve::cuda
