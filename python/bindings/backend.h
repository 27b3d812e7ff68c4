// Runs a problem on the device of its tensors: torch's thread pool on the CPU, torch's current
// stream on a GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "attnsieve/launch.h"
#include "python/bindings/checks.h"

#ifdef ATTNSIEVE_WITH_CUDA
#include "cuda/dispatch/device.h"

// CPU builds of torch do not define this symbol: the reference stays weak, so one library loads on
// both.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace attnsieve::binding {

inline ParallelFor torch_parallel_for() {
  return {[](int64_t items, ParallelFor::Body body, void* context) {
    torch::stable::parallel_for(0, items, 1,
                                [=](int64_t begin, int64_t end) { body(context, begin, end); });
  }};
}

template <class Problem>
void run(const Tensor& on, const Problem& problem,
         void (*on_cpu)(const Problem&, const ParallelFor&),
         void (*on_cuda)(const Problem&, void*)) {
  if (!on.is_cuda()) return on_cpu(problem, torch_parallel_for());
  void* stream = nullptr;
#ifdef ATTNSIEVE_WITH_CUDA
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  cuda::set_device(device);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  on_cuda(problem, stream);
}

}  // namespace attnsieve::binding
