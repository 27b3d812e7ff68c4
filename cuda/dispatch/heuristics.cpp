#include "cuda/dispatch/heuristics.h"

#include <string>

namespace attnsieve::cuda {

Backend choose_attend_backend(const AttendProblem& problem, const DeviceInfo& device) {
  if (device.compute_capability < 80) {
    throw Unsupported("attend needs a GPU of compute capability 8.0 or newer, got " +
                      std::to_string(device.compute_capability / 10) + "." +
                      std::to_string(device.compute_capability % 10));
  }
  require_supported("attend", Backend::kSm80, problem.dtype, problem.head_dim);
  return Backend::kSm80;
}

int select_threads(int64_t num_k_blocks) {
  if (num_k_blocks <= 64) return 64;
  return num_k_blocks <= 128 ? 128 : 256;
}

}  // namespace attnsieve::cuda
