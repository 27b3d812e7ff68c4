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

inline void check_grid(const char* name, int64_t ctas) {
  if (ctas > std::numeric_limits<int32_t>::max()) {
    throw InvalidArgument(std::string(name) + ": the problem needs " + std::to_string(ctas) +
                          " thread blocks, more than one grid dimension holds");
  }
}

// Launches kKernel<<<ctas, threads, shared_bytes, stream>>>(argument). A kernel whose launches differ
// in shared_bytes says how many they need at most.
template <auto kKernel, class Argument, size_t kMostSharedBytes = 0>
void launch(const char* name, int64_t ctas, int threads, size_t shared_bytes, void* stream,
            const Argument& argument) {
  if (ctas <= 0) return;
  check_grid(name, ctas);
  if (shared_bytes > kDefaultSharedMemory) {
    allow_shared_memory<kKernel>(std::max(shared_bytes, kMostSharedBytes), name);
  }
  kKernel<<<static_cast<unsigned>(ctas), static_cast<unsigned>(threads), shared_bytes,
            static_cast<cudaStream_t>(stream)>>>(argument);
  check_cuda(cudaGetLastError(), name);
}

// The same for `clusters` of `ranks` thread blocks.
template <auto kKernel, class Argument>
void launch_clusters(const char* name, int64_t clusters, int ranks, int threads,
                     size_t shared_bytes, void* stream, const Argument& argument) {
  if (clusters <= 0) return;
  check_grid(name, clusters * ranks);
  if (shared_bytes > kDefaultSharedMemory) allow_shared_memory<kKernel>(shared_bytes, name);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(clusters * ranks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kKernel, argument), name);
}

}  // namespace attnsieve
