// fetch_tokens on CUDA.
#include "attnsieve/fetch.h"

#include "cuda/dispatch/device.h"
#include "cuda/sm80/fetch_tokens/arguments.h"

namespace attnsieve::cuda {

size_t fetch_workspace_bytes(const FetchProblem& problem) {
  const int64_t words = 1 + int64_t{problem.num_slots} + problem.capacity;
  return static_cast<size_t>(problem.batch * problem.num_heads * words) * sizeof(int32_t);
}

void fetch_tokens(const FetchProblem& problem, void* stream) {
  check_fetch(problem);
  const int64_t lines = problem.batch * problem.num_heads;
  sm80::FetchArguments a;
  a.problem = problem;
  a.copied = static_cast<int32_t*>(problem.workspace);
  a.free = a.copied + lines;
  a.tokens = a.free + lines * problem.num_slots;
  sm80::launch_fetch_tokens(a, dispatch_device().num_sms, stream);
}

}  // namespace attnsieve::cuda
