// quantize_blocks on CUDA: checks, then one kernel of the element type.
#include "attnsieve/capability.h"
#include "attnsieve/launch.h"
#include "cuda/dispatch/instantiations.h"
#include "cuda/sm80/quantize/arguments.h"

namespace attnsieve::cuda {

size_t quantize_workspace_bytes(const QuantizeProblem& problem) {
  if (problem.mean == nullptr || problem.seqlen <= kSumRows) return 0;
  const int64_t first = sm80::level_size(problem, kSumRows);
  const int64_t second = sm80::level_size(problem, int64_t{kSumRows} * kSumRows);
  return static_cast<size_t>(first + second) * sizeof(float);
}

void quantize_blocks(const QuantizeProblem& problem, void* stream) {
  check_quantize(problem);
  require_supported("quantize_blocks", Backend::kSm80, problem.dtype, problem.head_dim);
  if (problem.batch == 0 || problem.num_heads == 0) return;
  switch (problem.dtype) {
    case DType::kFloat32: return sm80::launch_quantize_blocks<float>(problem, stream);
    case DType::kFloat16: return sm80::launch_quantize_blocks<__half>(problem, stream);
    case DType::kBFloat16: return sm80::launch_quantize_blocks<__nv_bfloat16>(problem, stream);
  }
}

}  // namespace attnsieve::cuda
