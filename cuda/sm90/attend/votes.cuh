// The votes of a warpgroup's warps on a tile, in one word of shared memory: a byte each, its top bit
// the phase of the ring when the warp voted, its lowest set if the warp keeps the tile. One veto
// decides, so a warp that has one waits for nobody. Nothing but the bits themselves is passed on.
#pragma once

#include <cstdint>

namespace attnsieve::sm90 {

inline constexpr uint32_t kNoVotes = 0x80808080u;  // before the first phase, 0

enum class Verdict { kOpen, kKept, kSkipped };

// `address` of the warp's byte, in shared memory.
__device__ __forceinline__ void cast_vote(uint32_t address, uint32_t phase, bool veto) {
  asm volatile("st.volatile.shared.u8 [%0], %1;" ::"r"(address),
               "r"(phase << 7 | static_cast<uint32_t>(veto))
               : "memory");
}

__device__ __forceinline__ Verdict read_votes(const uint32_t& word, uint32_t phase) {
  const uint32_t votes = *const_cast<const volatile uint32_t*>(&word);
  const uint32_t open = (votes ^ (phase != 0 ? kNoVotes : 0u)) & kNoVotes;
  if ((votes & ~(open >> 7) & 0x01010101u) != 0) return Verdict::kKept;
  return open == 0 ? Verdict::kSkipped : Verdict::kOpen;
}

}  // namespace attnsieve::sm90
