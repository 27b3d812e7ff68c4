// The votes of a warpgroup's warps on a tile, in one word of shared memory: a byte each, its top bit
// the phase of the ring when the warp voted, its lowest set if the warp keeps the tile. One veto
// decides, so a warp that has one waits for nobody. Nothing but the bits themselves is passed on.
#pragma once

#include "cuda/sm90/attend/rows.cuh"

namespace attnsieve::sm90 {

inline constexpr uint32_t kNoVotes = 0x80808080u;  // before the first phase, 0

enum class Verdict { kOpen, kKept, kSkipped };

inline constexpr uint32_t kNobody = 0;

// `address` of the warp's byte in the first slot, in shared memory; kNobody casts nothing.
__device__ __forceinline__ void cast_vote(uint32_t address, int slot, uint32_t phase, bool veto) {
  asm volatile(
      "{\n"
      ".reg .pred votes;\n"
      "setp.ne.u32 votes, %0, 0;\n"
      "@votes st.volatile.shared.u8 [%1], %2;\n"
      "}" ::"r"(address),
      "r"(address + slot * static_cast<uint32_t>(sizeof(uint32_t))),
      "r"(phase << 7 | static_cast<uint32_t>(veto))
      : "memory");
}

__device__ __forceinline__ uint32_t read_word(const uint32_t& word) {
  return *const_cast<const volatile uint32_t*>(&word);
}
__device__ __forceinline__ bool has_veto(uint32_t votes) { return (votes & 0x01010101u) != 0; }

__device__ __forceinline__ Verdict read_votes(const uint32_t& word, uint32_t phase) {
  const uint32_t votes = read_word(word);
  const uint32_t open = (votes ^ (phase != 0 ? kNoVotes : 0u)) & kNoVotes;
  if ((votes & ~(open >> 7) & 0x01010101u) != 0) return Verdict::kKept;
  return open == 0 ? Verdict::kSkipped : Verdict::kOpen;
}

// What a warpgroup remembers from vote to vote of an item.
template <class Config>
struct Ballot {
  float limit[2];  // a score of a row that is not below keeps the tile
  float row_max[2];  // over the tiles kept so far
  float floor[2];
  float offset;  // ln(lambda) in unscaled logits
  uint32_t address;  // of the warp's vote in the first slot; kNobody in lanes that do not cast it
  int skipped = 0;  // tiles of the item
  int unseen = 0;
  // Of the tile voted on last:
  RingPosition<Config::kValueSlots> at{0};
  float lane_max[2];  // of the keys that the lane holds

  // A row that does not exist has no vote. Masked scores, -inf, have none but where everything is
  // kept.
  __device__ Ballot(const Rows& rows, const typename Config::SkipPolicy& policy,
                    const uint32_t* words)
      : offset(policy.offset()) {
    const int thread = opaque_thread() % kWarpgroupThreads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = rows.begin + row_of(thread, half);
      floor[half] = row >= 0 && row < rows.end ? policy.lowest_limit() : -negative_infinity();
      limit[half] = negative_infinity();
      row_max[half] = negative_infinity();
    }
    address = thread % kWarpThreads == 0 ? shared_address(words) + thread / kWarpThreads : kNobody;
  }
  // Takes the maxima of a kept tile into account.
  __device__ void raise() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      row_max[row] = max_nan(row_max[row], quad_max(lane_max[row]));
      limit[row] = fmaxf(row_max[row] + offset, floor[row]);
    }
  }
  __device__ void cast(bool veto) const { cast_vote(address, at.slot, at.phase, veto); }
  // The lane that speaks for the warp.
  __device__ bool speaks() const { return address != kNobody; }
};

}  // namespace attnsieve::sm90
