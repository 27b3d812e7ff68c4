#include "cuda/common/launch.cuh"
#include "cuda/dispatch/instantiations.h"
#include "cuda/sm80/select/kernel.cuh"
#include "cuda/sm80/select/marked.cuh"
#include "cuda/sm80/select/ranked.cuh"

namespace attnsieve::sm80 {

void launch_select_blocks(const SelectProblem& problem, int threads, void* stream) {
  const int64_t rows = problem.batch * problem.num_heads * problem.num_q_blocks();
  if (problem.rule == SelectRule::kMarked) {
    launch<select_marked_kernel>("select_marked", (rows + kMarkedWarps - 1) / kMarkedWarps,
                                 kMarkedWarps * kWarpThreads, 0, stream, problem);
    return;
  }
  if (problem.rule != SelectRule::kTopP && problem.num_k_blocks() <= kRankedColumns) {
    launch<select_ranked_kernel>("select_blocks", (rows + kRankedWarps - 1) / kRankedWarps,
                                 kRankedWarps * kWarpThreads, 0, stream, problem);
    return;
  }
  launch<select_blocks_kernel>("select_blocks", rows, threads, 0, stream, problem);
}

std::vector<KernelEntry> select_blocks_entries() {
  return {{"float32", reinterpret_cast<const void*>(select_blocks_kernel), 256, 0},
          {"ranked", reinterpret_cast<const void*>(select_ranked_kernel),
           kRankedWarps * kWarpThreads, 0},
          {"marked", reinterpret_cast<const void*>(select_marked_kernel),
           kMarkedWarps * kWarpThreads, 0}};
}

}  // namespace attnsieve::sm80
