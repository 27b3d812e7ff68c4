// The one place that launches kernels: grid limits, shared-memory opt-in, stream, error check.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>

#include "cuda/common/cuda_check.h"

namespace attnsieve {

// Lets kKernel use `bytes` of dynamic shared memory, once per kernel and device.
template <auto kKernel>
void allow_shared_memory(size_t bytes, const char* name) {
  static std::atomic<uint64_t> allowed{0};  // a bit per device
  int device = 0;
  check_cuda(cudaGetDevice(&device), name);
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device < 64 && (allowed.load(std::memory_order_relaxed) & bit) != 0) return;
  check_cuda(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      name);
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

// Launches kKernel<<<ctas, threads, shared_bytes, stream>>>(argument). A kernel whose launches differ
// in shared_bytes says how many they need at most.
template <auto kKernel, class Argument, size_t kMostSharedBytes = 0>
void launch(const char* name, int64_t ctas, int threads, size_t shared_bytes, void* stream,
            const Argument& argument) {
  if (ctas <= 0) return;
  if (ctas > std::numeric_limits<int32_t>::max()) {
    throw InvalidArgument(std::string(name) + ": the problem needs " + std::to_string(ctas) +
                          " thread blocks, more than one grid dimension holds");
  }
  if (shared_bytes > kDefaultSharedMemory) {
    allow_shared_memory<kKernel>(std::max(shared_bytes, kMostSharedBytes), name);
  }
  kKernel<<<static_cast<unsigned>(ctas), static_cast<unsigned>(threads), shared_bytes,
            static_cast<cudaStream_t>(stream)>>>(argument);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace attnsieve
