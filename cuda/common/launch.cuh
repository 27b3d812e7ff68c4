// The one place that launches kernels: grid limits, shared-memory opt-in, stream, error check.
#pragma once

#include <limits>
#include <string>

#include "cuda/common/cuda_check.h"

namespace attnsieve {

// Launches kernel<<<ctas, threads, shared_bytes, stream>>>(argument).
template <class Argument>
void launch(void (*kernel)(Argument), const char* name, int64_t ctas, int threads,
            size_t shared_bytes, void* stream, const Argument& argument) {
  if (ctas <= 0) return;
  if (ctas > std::numeric_limits<int32_t>::max()) {
    throw InvalidArgument(std::string(name) + ": the problem needs " + std::to_string(ctas) +
                          " thread blocks, more than one grid dimension holds");
  }
  if (shared_bytes > kDefaultSharedMemory) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               name);
  }
  kernel<<<static_cast<unsigned>(ctas), static_cast<unsigned>(threads), shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(argument);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace attnsieve
