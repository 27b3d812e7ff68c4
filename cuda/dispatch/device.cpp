#include "cuda/dispatch/device.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>

#include "cuda/common/cuda_check.h"

namespace attnsieve::cuda {
namespace {

DeviceInfo current_device() {
  constexpr int kMaxDevices = 64;
  constexpr int kPerSm = 1000;
  static std::array<std::atomic<int>, kMaxDevices> known{};  // capability + kPerSm * SMs
  int index = 0;
  check_cuda(cudaGetDevice(&index), "cudaGetDevice");
  if (index < kMaxDevices && known[index] != 0) {
    const int facts = known[index];
    return {facts % kPerSm, facts / kPerSm};
  }
  int major = 0;
  int minor = 0;
  int num_sms = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, index),
             "cudaDeviceGetAttribute");
  const int capability = major * 10 + minor;
  if (index < kMaxDevices) known[index] = capability + kPerSm * num_sms;
  return {capability, num_sms};
}

}  // namespace

DeviceInfo dispatch_device() {
  DeviceInfo device = current_device();
#if !ATTNSIEVE_SM90
  device.compute_capability = std::min(device.compute_capability, 89);
#endif
  return device_of_family(device, std::getenv("ATTNSIEVE_BACKEND"));
}

void set_device(int index) {
  int current = -1;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  if (current != index) check_cuda(cudaSetDevice(index), "cudaSetDevice");
}

}  // namespace attnsieve::cuda
