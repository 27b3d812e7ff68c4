// The Hopper instructions that CuTe does not wrap in the form used here: transaction barriers, bulk
// tensor copies, named barriers.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace attnsieve::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A delay that differs from warp to warp, at every barrier, for soak tests of the protocol.
__device__ __forceinline__ void jitter() {
#ifdef ATTNSIEVE_JITTER
  const uint32_t noise = (static_cast<uint32_t>(clock64()) ^ (threadIdx.x / 32 * 0x9e3779b9u) ^
                          (blockIdx.x * 0x85ebca6bu)) *
                         0xc2b2ae35u;
  if ((noise >> 28) < 4) __nanosleep((noise >> 16) & 0xfffu);
#endif
}

// One phase of arrivals and of bytes still to come.
struct TransactionBarrier {
  uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals));
  }
  __device__ __forceinline__ void arrive() {
    jitter();
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Of the lanes where the predicate holds, without a branch.
  __device__ __forceinline__ void arrive_if(bool predicate) {
    jitter();
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %1, 0;\n"
        "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
        "}" ::"r"(shared_address(this)),
        "r"(static_cast<uint32_t>(predicate))
        : "memory");
  }
  // Arrives, and lets the phase wait for `bytes` of bulk copies.
  __device__ __forceinline__ void arrive_expect(uint32_t bytes) {
    jitter();
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }
  // Blocks until the phase of this parity has completed.
  __device__ __forceinline__ void wait(uint32_t parity) {
    jitter();
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "retry:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra retry;\n"
        "}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
  // The same for warps that mostly wait: between looks they leave issue slots, and power, to the
  // others.
  __device__ __forceinline__ void wait_idle(uint32_t parity) {
    jitter();
    uint32_t done = 0;
    while (true) {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
      if (done != 0) return;
      __nanosleep(40);
    }
  }
};

// Makes initialised barriers visible to the copy engine and to the other warps.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders ordinary shared-memory writes before the tensor cores' and the copy engine's reads.
__device__ __forceinline__ void fence_shared_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void copy_box_4d(void* smem, const CUtensorMap* map,
                                            TransactionBarrier& barrier, int c0, int c1, int c2,
                                            int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(smem)),
      "l"(map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

__device__ __forceinline__ void copy_box_5d(void* smem, const CUtensorMap* map,
                                            TransactionBarrier& barrier, int c0, int c1, int c2,
                                            int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(smem)),
      "l"(map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  jitter();
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts towards a named_barrier_sync of others without waiting for it.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  jitter();
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Synchronises `threads` threads; true if the predicate holds for one of them.
__device__ __forceinline__ bool named_barrier_any(int id, int threads, bool predicate) {
  jitter();
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.u32 mine, %3, 0;\n"
      "bar.red.or.pred all, %1, %2, mine;\n"
      "selp.u32 %0, 1, 0, all;\n"
      "}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<uint32_t>(predicate))
      : "memory");
  return any != 0;
}

}  // namespace attnsieve::sm90
