// Pins the order of instructions. ptxas schedules a basic block by its own estimate of the critical
// path and ignores the order of the source: left to itself it waits for the running P V before the
// first exponential (8 % of the cycles of a dense problem). Data dependencies are all it respects,
// so this makes one, on a condition that never holds but that it cannot know.
#pragma once

#include "cuda/common/numeric.cuh"

namespace attnsieve::sm90 {

class Order {
 public:
  // `positive` is > 0 and known at run time only.
  __device__ explicit Order(int positive) : positive_(positive) {}

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
