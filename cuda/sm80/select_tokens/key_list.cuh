// Candidates in shared memory, and the exact cut among them.
#pragma once

#include "cuda/common/block_scan.cuh"
#include "cuda/sm80/select_tokens/search.cuh"

namespace attnsieve::sm80 {

// A candidate as one integer: its order, then how far it lies before the end of its list. The
// larger is better, and no two are equal.
using CandidateKey = uint64_t;

inline constexpr int kOrderShift = 32;
inline constexpr uint32_t kKeyCapacity = 8192;

__device__ __forceinline__ CandidateKey candidate_key(uint32_t order, uint32_t before_end) {
  return CandidateKey{order} << kOrderShift | before_end;
}

__device__ __forceinline__ int bit_width(CandidateKey x) { return 64 - __clzll(x); }

// The keys of a list that are worth a look, in no order.
struct KeyList {
  static constexpr int kBins = 2048;
  static constexpr int kBinBits = 11;
  static constexpr uint32_t kPairs = 512;  // so many are ranked each against each

  alignas(16) CandidateKey keys[kKeyCapacity];
  alignas(16) uint32_t histogram[kBins];  // zero between uses
  CandidateKey pairs[kPairs];
  CandidateKey cut;
  uint32_t size;  // counts also what does not fit
  uint32_t num_equal;  // candidates that equal the floor and are not listed
  uint32_t num_pairs;
  uint32_t max_order;
  DigitChoice choice;
  uint32_t warp_totals[kWarpThreads];

  template <int kThreads>
  __device__ void clear() {
    for (int i = threadIdx.x; i < kBins / 4; i += kThreads) {
      reinterpret_cast<uint4*>(histogram)[i] = make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x == 0) size = num_equal = num_pairs = max_order = 0;
  }

  // A key of which only the position is known.
  static __device__ void put(CandidateKey& key, uint32_t before_end) {
    *reinterpret_cast<uint32_t*>(&key) = before_end;
  }

  // Completes the keys with order_of(key) and finds the largest order, by all threads of a CTA.
  template <int kThreads, class OrderOf>
  __device__ void set_orders(OrderOf&& order_of) {
    uint32_t best = 0;
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const CandidateKey key = keys[i];
      const uint32_t order = order_of(key);
      keys[i] = candidate_key(order, static_cast<uint32_t>(key));
      best = ::max(best, order);
    }
    best = __reduce_max_sync(kWholeWarp, best);
    if (threadIdx.x % kWarpThreads == 0) atomicMax(&max_order, best);
    __syncthreads();
  }

  // The smallest of the best `kept` keys; 0 < kept < size. All are at least `floor` and lie less
  // than 2^position_bits before the end. By all threads of a CTA.
  template <int kThreads>
  __device__ CandidateKey find_cut(uint32_t kept, uint32_t floor, int position_bits) {
    CandidateKey low = candidate_key(floor, 0);
    uint32_t missing = kept;
    int shift = ::max(0, bit_width(candidate_key(max_order, kNoOrder) - low) - kBinBits);
    int bins = kBins;
    while (true) {
      count<kThreads>(low, shift, bins);
      choose<kThreads>(missing);
      low += CandidateKey{choice.bin} << shift;
      missing = choice.missing;
      if (missing == choice.bucket) return low;
      if (choice.bucket <= kPairs) return rank_pairs<kThreads>(low, shift, missing);
      // Orders are told apart to the last bit before positions are.
      int next = ::max(kOrderShift, shift - kBinBits);
      if (shift <= kOrderShift) {
        next = ::max(0, (shift == kOrderShift ? position_bits : shift) - kBinBits);
      }
      bins = 1 << ::min(kBinBits, shift - next);
      shift = next;
    }
  }

 private:
  template <int kThreads>
  __device__ void count(CandidateKey low, int shift, int bins) {
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const CandidateKey bin = (keys[i] - low) >> shift;  // wraps below `low`
      if (bin < bins) atomicAdd(&histogram[bin], 1u);
    }
    __syncthreads();
  }

  template <int kThreads>
  __device__ void choose(uint32_t missing) {
    constexpr int kBinsPerThread = kBins / kThreads;
    const int first = kBins - kBinsPerThread * (1 + static_cast<int>(threadIdx.x));
    uint32_t counts[kBinsPerThread];
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; i += 2) {
      auto& two = *reinterpret_cast<uint2*>(histogram + first + i);
      reinterpret_cast<uint2&>(counts[i]) = two;
      two = make_uint2(0, 0);
      sum += counts[i] + counts[i + 1];
    }
    uint32_t above = block_exclusive_sum<kThreads>(sum, warp_totals);
    if (above < missing && missing <= above + sum) {
#pragma unroll
      for (int i = kBinsPerThread - 1; i >= 0; --i) {
        if (above < missing && missing <= above + counts[i]) {
          choice = {static_cast<uint32_t>(first + i), missing - above, counts[i]};
        }
        above += counts[i];
      }
    }
    __syncthreads();
  }

  template <int kThreads>
  __device__ CandidateKey rank_pairs(CandidateKey low, int shift, uint32_t missing) {
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      if ((keys[i] - low) >> shift == 0) pairs[atomicAdd(&num_pairs, 1u)] = keys[i];
    }
    __syncthreads();
    const uint32_t count = num_pairs;
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      uint32_t better = 0;
      for (uint32_t j = 0; j < count; ++j) better += pairs[j] > pairs[i];
      if (better == missing - 1) cut = pairs[i];
    }
    __syncthreads();
    return cut;
  }
};

}  // namespace attnsieve::sm80
