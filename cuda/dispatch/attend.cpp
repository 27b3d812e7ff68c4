// attend on CUDA: run-time values -> one compiled kernel.
#include <cuda_runtime.h>

#include <string>
#include <type_traits>

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

template <class Element, int kHeadDim>
void attend_sm90(const AttendProblem& problem, const DeviceInfo& device, void* stream) {
  const sm90::AttendPlan plan = sm90::plan_attend(problem);
  const sm90::AttendArguments arguments = sm90::make_arguments(problem, plan);
  if (plan.dynamic) {
    check_cuda(
        cudaMemsetAsync(problem.workspace, 0, sizeof(unsigned), static_cast<cudaStream_t>(stream)),
        "attend: zero the workspace");
  }
  const auto launch = [&](auto interleaved) {
    constexpr bool kInterleaved = decltype(interleaved)::value;
    if (problem.is_indexed()) {
      sm90::launch_attend<Element, kHeadDim, kInterleaved, true>(arguments, plan, device.num_sms,
                                                                 stream);
    } else {
      sm90::launch_attend<Element, kHeadDim, kInterleaved, false>(arguments, plan, device.num_sms,
                                                                  stream);
    }
  };
  if constexpr (kHeadDim > 64) {
    if (plan.interleaved) return launch(std::true_type{});
  }
  launch(std::false_type{});
}

template <class Element>
void attend_sm90(const AttendProblem& problem, const DeviceInfo& device, void* stream) {
  switch (problem.head_dim) {
#if ATTNSIEVE_SM90 && ATTNSIEVE_HEAD_DIM_64
    case 64: return attend_sm90<Element, 64>(problem, device, stream);
#endif
#if ATTNSIEVE_SM90 && ATTNSIEVE_HEAD_DIM_96
    case 96: return attend_sm90<Element, 96>(problem, device, stream);
#endif
#if ATTNSIEVE_SM90 && ATTNSIEVE_HEAD_DIM_128
    case 128: return attend_sm90<Element, 128>(problem, device, stream);
#endif
#if ATTNSIEVE_SM90 && ATTNSIEVE_HEAD_DIM_256
    case 256: return attend_sm90<Element, 256>(problem, device, stream);
#endif
    default:
      throw Unsupported("attend: sm_90 with head_dim " + std::to_string(problem.head_dim) +
                        " was left out of this build");
  }
}

template <class Element>
void attend_on(Backend backend, const AttendProblem& problem, const DeviceInfo& device,
               void* stream) {
  if (backend == Backend::kSm90) return attend_sm90<Element>(problem, device, stream);
  attend_sm80<Element>(problem, stream);
}

}  // namespace

size_t attend_workspace_bytes(const AttendProblem& problem) {
  const DeviceInfo device = dispatch_device();
  const Backend backend = choose_attend_backend(problem, device);
  if (backend != Backend::kSm90 || problem.batch == 0 || problem.seqlen_q == 0) return 0;
  AttendProblem with_workspace = problem;
  with_workspace.workspace = &with_workspace;
  const sm90::AttendPlan plan = sm90::plan_attend(with_workspace);
  const bool one_item_each = sm90::count_items(problem, plan).items <= device.num_sms;
  return plan.dynamic && !one_item_each ? sizeof(unsigned) : 0;
}

void attend(const AttendProblem& problem, void* stream) {
  const DeviceInfo device = dispatch_device();
  const Backend backend = choose_attend_backend(problem, device);
  check_sizes(problem);
  zero_counters(problem, stream);
  if (problem.batch == 0 || problem.seqlen_q == 0) return;
  switch (problem.dtype) {
    case DType::kFloat16: return attend_on<cute::half_t>(backend, problem, device, stream);
    case DType::kBFloat16: return attend_on<cute::bfloat16_t>(backend, problem, device, stream);
    case DType::kFloat32: break;  // refused by the capability table
  }
}

}  // namespace attnsieve::cuda
