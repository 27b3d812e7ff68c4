#include "cuda/common/launch.cuh"
#include "cuda/dispatch/instantiations.h"
#include "cuda/sm80/select/kernel.cuh"

namespace attnsieve::sm80 {

void launch_select_blocks(const SelectProblem& problem, int threads, void* stream) {
  launch<select_blocks_kernel>("select_blocks",
                               problem.batch * problem.num_heads * problem.num_q_blocks(), threads,
                               0, stream, problem);
}

std::vector<KernelEntry> select_blocks_entries() {
  return {{"float32", reinterpret_cast<const void*>(select_blocks_kernel), 256, 0}};
}

}  // namespace attnsieve::sm80
