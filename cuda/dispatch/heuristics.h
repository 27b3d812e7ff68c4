// Choices the host makes before a launch, as pure functions of the problem: testable without a GPU.
#pragma once

#include "attnsieve/capability.h"
#include "attnsieve/problem.h"

namespace attnsieve::cuda {

struct DeviceInfo {
  int compute_capability = 0;  // 80, 86, 90 ...
};

// The kernel family that runs `attend` on a device: the newest compiled one that serves the
// problem.
Backend choose_attend_backend(const AttendProblem& problem, const DeviceInfo& device);

// Threads of a row-selection CTA: enough to cover the row, at most 256.
int select_threads(int64_t num_k_blocks);

}  // namespace attnsieve::cuda
