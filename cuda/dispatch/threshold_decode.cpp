// threshold_decode on CUDA: run-time values -> one compiled kernel.
#include "attnsieve/launch.h"
#include "cuda/dispatch/decode_arguments.h"
#include "cuda/dispatch/device.h"
#include "cuda/dispatch/instantiations.h"

namespace attnsieve::cuda {
namespace {

template <class Element, int kHeadDim>
void launch(const sm80::DecodeArguments& arguments, void* stream) {
  if (arguments.problem.code == Code::kNone)
    return sm80::launch_threshold_decode<Element, Element, kHeadDim>(arguments, stream);
  sm80::launch_threshold_decode<Element, cute::float_e4m3_t, kHeadDim>(arguments, stream);
}

template <class Element>
void launch(const sm80::DecodeArguments& arguments, void* stream) {
  switch (arguments.problem.head_dim) {
#if ATTNSIEVE_HEAD_DIM_64
    case 64: return launch<Element, 64>(arguments, stream);
#endif
#if ATTNSIEVE_HEAD_DIM_128
    case 128: return launch<Element, 128>(arguments, stream);
#endif
    default:
      throw Unsupported("threshold_decode: head_dim " + std::to_string(arguments.problem.head_dim) +
                        " was left out of this build");
  }
}

void check(const DecodeProblem& problem) {
  if (problem.index.given()) throw InvalidArgument("threshold_decode: takes no index");
  if (problem.num_splits < 1 || problem.num_splits > kMaxDecodeSplits) {
    throw InvalidArgument("threshold_decode: num_splits must be in [1, " +
                          std::to_string(kMaxDecodeSplits) + "], got " +
                          std::to_string(problem.num_splits));
  }
}

void zero_counters(const DecodeProblem& problem, void* stream) {
  const size_t bytes = sizeof(int64_t) * 2 * problem.batch * problem.num_heads;
  if (problem.threshold.counters == nullptr || bytes == 0) return;
  check_cuda(
      cudaMemsetAsync(problem.threshold.counters, 0, bytes, static_cast<cudaStream_t>(stream)),
      "threshold_decode: zero the tile counters");
}

}  // namespace

size_t threshold_decode_workspace_bytes(const DecodeProblem& problem) {
  if (is_empty(problem)) return 0;
  return DecodeWorkspace(plan_threshold_decode(problem), problem.head_dim).bytes;
}

void threshold_decode(const DecodeProblem& problem, void* stream) {
  require_supported("threshold_decode", Backend::kSm80, problem.dtype, problem.head_dim);
  check(problem);
  zero_counters(problem, stream);
  if (is_empty(problem)) return;
  if (dispatch_device().compute_capability < 80) {
    throw Unsupported("threshold_decode needs a GPU of compute capability 8.0 or newer");
  }
  const sm80::DecodeArguments arguments =
      decode_arguments("threshold_decode", problem, plan_threshold_decode(problem), stream);
  switch (problem.dtype) {
    case DType::kFloat16: return launch<cute::half_t>(arguments, stream);
    case DType::kBFloat16: return launch<cute::bfloat16_t>(arguments, stream);
    case DType::kFloat32: break;  // refused by the capability table
  }
}

}  // namespace attnsieve::cuda
