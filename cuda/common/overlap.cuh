// Programmatic dependent launch: the kernels of a decode step hide each other's starts.
#pragma once

namespace attnsieve {

// The first statement of a kernel that is launched with Launch::kOverlapped: the next such kernel may
// start, and this one waits until all that precedes it in the stream has written its results. Does
// nothing where the launch was a plain one; machine code before sm_90 does not wait, and must not be
// launched otherwise.
__device__ __forceinline__ void begin_overlapped() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace attnsieve
