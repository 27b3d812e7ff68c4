// The score of the last candidate kept, digit by digit from histograms of score orders.
#pragma once

#include <cub/block/block_scan.cuh>

#include "cuda/sm80/select_tokens/list.cuh"

namespace attnsieve::sm80 {

// Keeps orders above `order`, and the first `equals` that are equal to it.
struct ScoreCut {
  uint32_t order;
  uint32_t equals;
};

// Digits of 11, 11 and 10 bits.
inline constexpr int kScoreDigits = 3;
inline constexpr int kScoreBins = 1 << 11;

__device__ __forceinline__ int digit_shift(int digit) {
  return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}
__device__ __forceinline__ uint32_t digit_mask(int digit) { return digit == 2 ? 0x3ff : 0x7ff; }
// Bits of an order before those of the digit.
__device__ __forceinline__ uint32_t prefix_mask(int digit) {
  return digit == 0 ? 0 : ~0u << digit_shift(digit - 1);
}

// The digit of the cut, and what is left to do in its bin.
struct DigitChoice {
  uint32_t bin;
  uint32_t missing;
  uint32_t bucket;
};

// What is known of a list's cut, as far as a search has come.
struct CutState {
  ScoreCut cut;  // once `found`
  bool found;
  uint32_t wanted;   // ranked candidates before the cut to the list's room
  uint32_t kept;     // and after
  uint32_t prefix;   // leading digits of the cut
  uint32_t missing;  // candidates to keep among those with this prefix
  uint32_t bucket;   // candidates with this prefix
};

struct CutSearch : CutState {
  // Before any score is read. The threshold rule has to count first.
  __device__ explicit CutSearch(const ScoreList& list) {
    prefix = 0;
    bucket = static_cast<uint32_t>(list.candidates.ranked());
    found = false;
    if (!list.has_threshold()) start(list, bucket);
  }

  __device__ void start(const ScoreList& list, uint32_t candidates_wanted) {
    wanted = candidates_wanted;
    kept = min(wanted, list.room());
    missing = kept;
    // What the threshold cuts off, nothing, or everything: the last two need no look at a score.
    found = kept == 0 || kept == wanted;
    cut = {list.limit, 0};
  }

  __device__ void descend(int digit, const DigitChoice& choice) {
    prefix |= choice.bin << digit_shift(digit);
    missing = choice.missing;
    bucket = choice.bucket;
    // The whole bin is kept. Not the lowest one: then nothing would be cut off.
    found = missing == bucket || digit == kScoreDigits - 1;
    cut = missing == bucket ? ScoreCut{prefix - 1, 0} : ScoreCut{prefix, missing};
  }
};

// Counts digits and chooses among them, with all threads of a CTA.
template <int kThreads>
class DigitCounter {
 public:
  using Scan = cub::BlockScan<uint32_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  static constexpr uint32_t kListCapacity = 4096;

  struct SharedStorage {
    typename Scan::TempStorage scan;
    uint32_t histogram[kScoreBins];
    uint32_t list[kListCapacity];  // orders with the prefix of the cut, in no order
    uint32_t list_size;
    uint32_t passing;
    DigitChoice choice;
  };

  __device__ explicit DigitCounter(SharedStorage& smem) : smem_(smem) {}

  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kScoreBins; bin += kThreads) smem_.histogram[bin] = 0;
    if (threadIdx.x == 0) {
      smem_.list_size = 0;
      smem_.passing = 0;
    }
    __syncthreads();
  }

  // Whether orders with the prefix are collected while their next digit is counted: the digit after
  // that then needs no sweep.
  __device__ static bool collects(const CutSearch& search, int digit) {
    return digit == 1 && search.bucket <= kListCapacity;
  }

  // Counts the digit of the candidates [begin, end) that have the prefix. With the first digit also
  // those that pass the threshold.
  __device__ void count(const ScoreList& list, uint32_t begin, uint32_t end,
                        const CutSearch& search, int digit) {
    const bool collect = collects(search, digit);
    const uint32_t lane = threadIdx.x % kWarpThreads;
    const uint32_t before = (1u << lane) - 1;
    const uint32_t first = begin / kWarpThreads + threadIdx.x / kWarpThreads;
    const int shift = digit_shift(digit);
    const uint32_t mask = digit_mask(digit);
    const uint32_t prefix_bits = prefix_mask(digit);
    uint32_t passing = 0;
    for_each_word<8>(list.scores, begin, end, first, kThreads / kWarpThreads,
                     [&](uint32_t, bool inside, uint32_t order) {
                       const bool match = inside && (order & prefix_bits) == search.prefix;
                       passing += inside && order > list.limit;
                       if (match) atomicAdd(&smem_.histogram[order >> shift & mask], 1u);
                       if (!collect) return;
                       const unsigned matches = __ballot_sync(kWholeWarp, match);
                       if (matches == 0) return;
                       uint32_t slot = 0;
                       if (lane == 0) slot = atomicAdd(&smem_.list_size, __popc(matches));
                       slot = __shfl_sync(kWholeWarp, slot, 0);
                       if (match) smem_.list[slot + __popc(matches & before)] = order;
                     });
    if (digit > 0 || !list.has_threshold()) return;
    passing = __reduce_add_sync(kWholeWarp, passing);
    if (lane == 0) atomicAdd(&smem_.passing, passing);
  }

  // The same from the first `size` orders of the list in shared memory.
  __device__ void count_list(uint32_t size, const CutSearch& search, int digit) {
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint32_t order = smem_.list[i];
      if ((order & prefix_mask(digit)) != search.prefix) continue;
      atomicAdd(&smem_.histogram[order >> digit_shift(digit) & digit_mask(digit)], 1u);
    }
  }

  // Moves the search on by the digit that was counted, and clears the counts. Barriers at its
  // begin and end part it from counting.
  __device__ void choose(CutSearch& search, int digit) {
    constexpr int kBinsPerThread = kScoreBins / kThreads;
    const int top = kScoreBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
    uint32_t counts[kBinsPerThread];
    uint32_t above[kBinsPerThread];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      counts[i] = smem_.histogram[top - i];
      smem_.histogram[top - i] = 0;
    }
    Scan(smem_.scan).ExclusiveSum(counts, above);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (above[i] < search.missing && search.missing - above[i] <= counts[i]) {
        smem_.choice = {static_cast<uint32_t>(top - i), search.missing - above[i], counts[i]};
      }
    }
    __syncthreads();
    search.descend(digit, smem_.choice);
  }

 private:
  SharedStorage& smem_;
};

}  // namespace attnsieve::sm80
