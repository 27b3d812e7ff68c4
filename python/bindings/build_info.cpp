#include "python/bindings/build_info.h"

#include "attnsieve/capability.h"

#ifdef ATTNSIEVE_WITH_CUDA
#include "cuda/common/cuda_check.h"
#include "cuda/dispatch/kernel_table.h"
#endif

namespace attnsieve {

std::map<std::string, std::string> build_info() {
  return {{"version", ATTNSIEVE_VERSION},
          {"kernel_hash", ATTNSIEVE_KERNEL_HASH},
          {"compiler", ATTNSIEVE_COMPILER},
          {"cuda", ATTNSIEVE_CUDA_VERSION},
          {"archs", ATTNSIEVE_ARCHS},
          {"head_dims", ATTNSIEVE_HEAD_DIMS},
          {"torch_target", ATTNSIEVE_TORCH_TARGET}};
}

std::vector<CapabilityRow> capability_rows() {
  std::vector<CapabilityRow> rows;
  for (const Capability& row : capabilities()) {
    const std::string supported = row.max_head_dim == 0 ? "dtype float32 scores" : row.supported();
    rows.push_back({row.op, backend_name(row.backend), supported, row.features});
  }
  return rows;
}

#ifdef ATTNSIEVE_WITH_CUDA
std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const KernelEntry& entry : cuda::kernel_table()) names.push_back(entry.name);
  return names;
}

std::vector<KernelAttributes> kernel_attributes() {
  std::vector<KernelAttributes> rows;
  for (const KernelEntry& entry : cuda::kernel_table()) {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, entry.function), entry.name.c_str());
    if (entry.shared_bytes > kDefaultSharedMemory) {
      check_cuda(cudaFuncSetAttribute(entry.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(entry.shared_bytes)),
                 entry.name.c_str());
    }
    int ctas = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, entry.function, entry.threads,
                                                             entry.shared_bytes),
               entry.name.c_str());
    rows.push_back(
        {entry.name, entry.threads, attributes.numRegs, static_cast<int>(attributes.localSizeBytes),
         static_cast<int>(attributes.sharedSizeBytes), static_cast<int>(entry.shared_bytes), ctas});
  }
  return rows;
}
#else
std::vector<std::string> kernel_names() { return {}; }

std::vector<KernelAttributes> kernel_attributes() {
  throw Unsupported("this build has the CPU backend only, so there are no CUDA kernels");
}
#endif

}  // namespace attnsieve
