// decode on CUDA: run-time values -> one compiled kernel, and the layout of its workspace.
#include <cuda_runtime.h>

#include <string>

#include "attnsieve/launch.h"
#include "cuda/common/cuda_check.h"
#include "cuda/dispatch/device.h"
#include "cuda/dispatch/instantiations.h"
#include "cuda/sm80/decode/arguments.h"

namespace attnsieve::cuda {
namespace {

// Partial results of chunks, then the counters. Items of one chunk leave nothing.
struct Workspace {
  Workspace(const DecodePlan& plan, int64_t head_dim) {
    if (plan.max_chunks == 1 || plan.ranks > 0) return;
    const auto aligned = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
    const size_t columns = size_t{1} * plan.items * plan.max_chunks * plan.columns;
    state = aligned(columns * head_dim * sizeof(float));
    arrivals = state + aligned(columns * sizeof(float2));
    bytes = arrivals + plan.items * sizeof(unsigned);
  }
  size_t state = 0;  // offsets; partial outputs are at 0
  size_t arrivals = 0;
  size_t bytes = 0;
};

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

bool is_empty(const DecodeProblem& problem) {
  return problem.batch == 0 || problem.seqlen_q == 0 || problem.num_heads == 0;
}

}  // namespace

size_t decode_workspace_bytes(const DecodeProblem& problem) {
  if (is_empty(problem)) return 0;
  return Workspace(plan_decode(problem, dispatch_device()), problem.head_dim).bytes;
}

void decode(const DecodeProblem& problem, void* stream) {
  require_supported("decode", Backend::kSm80, problem.dtype, problem.head_dim);
  if (is_empty(problem)) return;
  const DeviceInfo device = dispatch_device();
  if (device.compute_capability < 80) {
    throw Unsupported("decode needs a GPU of compute capability 8.0 or newer");
  }
  sm80::DecodeArguments arguments{};
  arguments.problem = problem;
  arguments.plan = plan_decode(problem, device);
  if (problem.index.given()) {
    arguments.index_page = cutlass::FastDivmod(static_cast<int>(problem.index.page_size));
  }
  if (problem.paged.block_table != nullptr) {
    arguments.cache_page = cutlass::FastDivmod(problem.paged.page_size);
  }
  const Workspace workspace(arguments.plan, problem.head_dim);
  if (workspace.bytes > 0) {
    auto* const base = static_cast<char*>(problem.workspace);
    if (base == nullptr) throw InvalidArgument("decode: the problem needs a workspace");
    arguments.partial_out = reinterpret_cast<float*>(base);
    arguments.partial_state = reinterpret_cast<float2*>(base + workspace.state);
    arguments.arrivals = reinterpret_cast<unsigned*>(base + workspace.arrivals);
    check_cuda(cudaMemsetAsync(arguments.arrivals, 0, workspace.bytes - workspace.arrivals,
                               static_cast<cudaStream_t>(stream)),
               "decode: zero the counters");
  }
  switch (problem.dtype) {
    case DType::kFloat16: return launch<cute::half_t>(arguments, device.num_sms, stream);
    case DType::kBFloat16: return launch<cute::bfloat16_t>(arguments, device.num_sms, stream);
    case DType::kFloat32: break;  // refused by the capability table
  }
}

}  // namespace attnsieve::cuda
