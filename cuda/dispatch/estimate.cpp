// quantize_blocks and estimate_block_scores on CUDA: checks, then one kernel of the type or head_dim.
#include "attnsieve/capability.h"
#include "attnsieve/launch.h"
#include "cuda/dispatch/device.h"
#include "cuda/dispatch/instantiations.h"
#include "cuda/sm80/quantize/arguments.h"
#include "cuda/sm90/estimate/arguments.h"

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

#if ATTNSIEVE_SM90
namespace {

void estimate_sm90(const EstimateProblem& problem, void* stream) {
  switch (problem.head_dim) {
#if ATTNSIEVE_HEAD_DIM_64
    case 64: return sm90::launch_estimate_block_scores<64>(problem, stream);
#endif
#if ATTNSIEVE_HEAD_DIM_96
    case 96: return sm90::launch_estimate_block_scores<96>(problem, stream);
#endif
#if ATTNSIEVE_HEAD_DIM_128
    case 128: return sm90::launch_estimate_block_scores<128>(problem, stream);
#endif
  }
  throw Unsupported("estimate_block_scores: this build has no kernels for head_dim " +
                    std::to_string(problem.head_dim));
}

}  // namespace
#endif

void estimate_block_scores(const EstimateProblem& problem, void* stream) {
  check_estimate(problem);
  require_supported("estimate_block_scores", Backend::kSm80, DType::kFloat32, problem.head_dim);
  if (problem.batch == 0 || problem.seqlen_k == 0) return;
#if ATTNSIEVE_SM90
  if (dispatch_device().compute_capability == 90 && sm90::serves(problem))
    return estimate_sm90(problem, stream);
#endif
  switch (problem.head_dim) {
#if ATTNSIEVE_HEAD_DIM_64
    case 64: return sm80::launch_estimate_block_scores<64>(problem, stream);
#endif
#if ATTNSIEVE_HEAD_DIM_96
    case 96: return sm80::launch_estimate_block_scores<96>(problem, stream);
#endif
#if ATTNSIEVE_HEAD_DIM_128
    case 128: return sm80::launch_estimate_block_scores<128>(problem, stream);
#endif
#if ATTNSIEVE_HEAD_DIM_256
    case 256: return sm80::launch_estimate_block_scores<256>(problem, stream);
#endif
  }
  throw Unsupported("estimate_block_scores: this build has no kernels for head_dim " +
                    std::to_string(problem.head_dim));
}

}  // namespace attnsieve::cuda
