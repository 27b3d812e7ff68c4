// merge_states, select_blocks and select_tokens on CUDA.
#include "attnsieve/launch.h"
#include "attnsieve/token_select.h"
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

size_t select_tokens_workspace_bytes(const TokenSelectProblem& problem) {
  const sm80::SelectTokensPlan plan = sm80::plan_select_tokens(problem, dispatch_device());
  return sm80::select_tokens_workspace_bytes(problem.batch * problem.seqlen_q * problem.num_lists,
                                             plan.parts);
}

void select_tokens(const TokenSelectProblem& problem, void* stream) {
  check_token_select(problem);
  sm80::SelectTokensPlan plan = sm80::plan_select_tokens(problem, dispatch_device());
#if ATTNSIEVE_SM90
  if (plan.ranks > 1) return sm90::launch_select_tokens(problem, plan, stream);
#endif
  if (problem.workspace == nullptr) plan.parts = 1;
  sm80::launch_select_tokens(problem, plan, stream);
}

}  // namespace attnsieve::cuda
