// Facts of the current CUDA device, read once per device.
#pragma once

#include "cuda/dispatch/heuristics.h"

namespace attnsieve::cuda {

// What kernels are chosen for: the current device, taken for 8.9 at most where this build has no sm_90
// kernels or the environment's ATTNSIEVE_BACKEND asks for sm_80.
DeviceInfo dispatch_device();

// Makes `index` current in this library's CUDA runtime, which is not the one torch links.
void set_device(int index);

}  // namespace attnsieve::cuda
