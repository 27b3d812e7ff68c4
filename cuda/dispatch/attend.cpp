// attend on CUDA: run-time values -> one compiled kernel.
#include <cuda_runtime.h>

#include <string>

#include "attnsieve/launch.h"
#include "cuda/common/cuda_check.h"
#include "cuda/dispatch/device.h"
#include "cuda/dispatch/instantiations.h"

namespace attnsieve::cuda {
namespace {

void check_sizes(const AttendProblem& problem) {
  // Kernels add two positions in 32 bits (kMaxTokens of work_tile.cuh).
  constexpr int64_t kMaxTokens = (int64_t{1} << 30) - 1;
  if (problem.seqlen_q > kMaxTokens || problem.seqlen_k > kMaxTokens) {
    throw InvalidArgument("attend: sequences hold at most " + std::to_string(kMaxTokens) +
                          " tokens");
  }
}

void zero_counters(const AttendProblem& problem, void* stream) {
  if (!problem.threshold.enabled || problem.threshold.counters == nullptr) return;
  const size_t bytes = sizeof(int64_t) * 2 * problem.batch * problem.num_heads;
  if (bytes == 0) return;
  check_cuda(
      cudaMemsetAsync(problem.threshold.counters, 0, bytes, static_cast<cudaStream_t>(stream)),
      "attend: zero the counters");
}

template <class Element>
void attend_sm80(const AttendProblem& problem, void* stream) {
  switch (problem.head_dim) {
#if ATTNSIEVE_HEAD_DIM_64
    case 64: return sm80::launch_attend<Element, 64>(problem, stream);
#endif
#if ATTNSIEVE_HEAD_DIM_128
    case 128: return sm80::launch_attend<Element, 128>(problem, stream);
#endif
    default:
      throw Unsupported("attend: head_dim " + std::to_string(problem.head_dim) +
                        " was left out of this build");
  }
}

}  // namespace

void attend(const AttendProblem& problem, void* stream) {
  choose_attend_backend(problem, current_device());
  check_sizes(problem);
  zero_counters(problem, stream);
  if (problem.batch == 0 || problem.seqlen_q == 0) return;
  switch (problem.dtype) {
    case DType::kFloat16: return attend_sm80<cute::half_t>(problem, stream);
    case DType::kBFloat16: return attend_sm80<cute::bfloat16_t>(problem, stream);
    case DType::kFloat32: break;  // refused by the capability table
  }
}

}  // namespace attnsieve::cuda
