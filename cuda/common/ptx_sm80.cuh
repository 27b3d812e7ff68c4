// Instructions of sm_80 that have no intrinsic: cp.async, with the zero-fill form that keeps ragged
// tiles free of stale bytes, and movmatrix.
#pragma once

#include <cstdint>

namespace attnsieve::sm80 {

// Starts a copy of 16 bytes global -> shared.
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(address), "l"(gmem));
}

// The same, or 16 zero bytes and no read when `valid` is false.
__device__ __forceinline__ void cp_async_16_or_zero(void* smem, const void* gmem, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(address), "l"(gmem),
               "r"(bytes));
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending));
}

// Transposes an 8x8 matrix of 16-bit elements that a warp holds as an MMA fragment.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t matrix) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

}  // namespace attnsieve::sm80
