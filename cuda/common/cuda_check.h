// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "attnsieve/status.h"

namespace attnsieve {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw CudaError(std::string(what) + ": " + cudaGetErrorString(status));
}

// Dynamic shared memory above this needs an opt-in per kernel and device.
inline constexpr size_t kDefaultSharedMemory = 48 * 1024;

}  // namespace attnsieve
