// Pins the order of instructions. ptxas schedules a basic block by its own estimate of the critical
// path and ignores the order of the source. Left to itself it waits for the running P V before the
// first exponential, and finds every maximum first (8 % of the cycles of a dense problem). Data
// dependencies are all it respects, so these make some, on a condition that never holds but that it
// cannot know.
#pragma once

#include "cuda/common/numeric.cuh"

namespace attnsieve::sm90 {

class Order {
 public:
  // `positive` is > 0 and known at run time only.
  __device__ explicit Order(int positive) : positive_(positive) {}

  // `value`, which is not used before `earlier` is known.
  __device__ __forceinline__ float after(float value, float earlier) const {
    float result;
    asm volatile(
        "{\n"
        ".reg .pred never;\n"
        "setp.lt.s32 never, %3, 0;\n"
        "selp.f32 %0, %2, %1, never;\n"
        "}"
        : "=f"(result)
        : "f"(value), "f"(earlier), "r"(positive_));
    return result;
  }

  // `value` is computed before anything behind this point that waits for wgmma: ptxas keeps those
  // waits behind earlier stores to shared memory.
  __device__ __forceinline__ void complete(float value) const {
    asm volatile(
        "{\n"
        ".reg .pred never;\n"
        "setp.lt.s32 never, %1, 0;\n"
        "@never st.shared.f32 [%1], %0;\n"
        "}" ::"f"(value),
        "r"(positive_)
        : "memory");
  }

 private:
  int positive_;
};

}  // namespace attnsieve::sm90
