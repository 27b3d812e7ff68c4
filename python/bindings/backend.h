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

// Makes the device of a CUDA tensor current, in torch and in this library.
class DeviceScope {
 public:
#ifdef ATTNSIEVE_WITH_CUDA
  explicit DeviceScope(const Tensor& on) : guard_(on.get_device_index()) {
    cuda::set_device(on.get_device_index());
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#else
  explicit DeviceScope(const Tensor&) {}
#endif
};

template <class Problem>
void run(const Tensor& on, const Problem& problem,
         void (*on_cpu)(const Problem&, const ParallelFor&),
         void (*on_cuda)(const Problem&, void*)) {
  if (!on.is_cuda()) return on_cpu(problem, torch_parallel_for());
  const DeviceScope scope(on);
  void* stream = nullptr;
#ifdef ATTNSIEVE_WITH_CUDA
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
#endif
  on_cuda(problem, stream);
}

}  // namespace attnsieve::binding
