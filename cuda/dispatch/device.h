// Facts of the current CUDA device, read once per device.
#pragma once

#include "cuda/dispatch/heuristics.h"

namespace attnsieve::cuda {

DeviceInfo current_device();

// The same, but 8.9 at most where this build has no sm_90 kernels.
DeviceInfo current_device_as_compiled();

// Makes `index` current in this library's CUDA runtime, which is not the one torch links.
void set_device(int index);

}  // namespace attnsieve::cuda
