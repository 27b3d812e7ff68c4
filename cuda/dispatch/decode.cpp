// decode on CUDA: run-time values -> one compiled kernel, and the layout of its workspace.
#include <string>

#include "attnsieve/launch.h"
#include "cuda/dispatch/decode_arguments.h"
#include "cuda/dispatch/device.h"
#include "cuda/dispatch/instantiations.h"

namespace attnsieve::cuda {
namespace {

template <class Element, class Stored, int kHeadDim>
void launch(const sm80::DecodeArguments& arguments, int num_sms, void* stream) {
#if ATTNSIEVE_SM90
  if (arguments.plan.ranks > 0)
    return sm90::launch_decode_lists<Element, Stored, kHeadDim>(arguments, stream);
#endif
  sm80::launch_decode<Element, Stored, kHeadDim>(arguments, num_sms, stream);
}

template <class Element, int kHeadDim>
void launch(const sm80::DecodeArguments& arguments, int num_sms, void* stream) {
  if (arguments.problem.code == Code::kNone)
    return launch<Element, Element, kHeadDim>(arguments, num_sms, stream);
  launch<Element, cute::float_e4m3_t, kHeadDim>(arguments, num_sms, stream);
}

template <class Element>
void launch(const sm80::DecodeArguments& arguments, int num_sms, void* stream) {
  switch (arguments.problem.head_dim) {
#if ATTNSIEVE_HEAD_DIM_64
    case 64: return launch<Element, 64>(arguments, num_sms, stream);
#endif
#if ATTNSIEVE_HEAD_DIM_128
    case 128: return launch<Element, 128>(arguments, num_sms, stream);
#endif
    default:
      throw Unsupported("decode: head_dim " + std::to_string(arguments.problem.head_dim) +
                        " was left out of this build");
  }
}

}  // namespace

size_t decode_workspace_bytes(const DecodeProblem& problem) {
  if (is_empty(problem)) return 0;
  return DecodeWorkspace(plan_decode(problem, dispatch_device()), problem.head_dim).bytes;
}

void decode(const DecodeProblem& problem, void* stream) {
  require_supported("decode", Backend::kSm80, problem.dtype, problem.head_dim);
  if (is_empty(problem)) return;
  const DeviceInfo device = dispatch_device();
  if (device.compute_capability < 80) {
    throw Unsupported("decode needs a GPU of compute capability 8.0 or newer");
  }
  const sm80::DecodeArguments arguments =
      decode_arguments("decode", problem, plan_decode(problem, device), stream);
  switch (problem.dtype) {
    case DType::kFloat16: return launch<cute::half_t>(arguments, device.num_sms, stream);
    case DType::kBFloat16: return launch<cute::bfloat16_t>(arguments, device.num_sms, stream);
    case DType::kFloat32: break;  // refused by the capability table
  }
}

}  // namespace attnsieve::cuda
