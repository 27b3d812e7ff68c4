// A floor under the cut of a list, from a sample of its scores.
#pragma once

#include "cuda/common/block_scan.cuh"
#include "cuda/sm80/select_tokens/search.cuh"
#include "cuda/sm80/select_tokens/span.cuh"

namespace attnsieve::sm80 {

struct ScoreFloor {
  uint32_t order;
  bool equal_apart;  // too many candidates equal it to be listed

  // As a score: what reaches the floor is at least that, and everything reaches 0.
  __device__ float least() const {
    return __uint_as_float((order & 0x80000000u) != 0 ? order ^ 0x80000000u : ~order);
  }
};

template <int kThreads>
class FloorSample {
 public:
  static constexpr int kBins = 4096;
  struct SharedStorage {
    alignas(16) uint32_t histogram[kBins];  // zero between uses
    uint32_t warp_totals[kWarpThreads];
    DigitChoice choice;
  };

  // Starts the loads.
  __device__ explicit FloorSample(const CandidateSpan& span) { load(span, 0); }

  static __device__ void clear(SharedStorage& smem) {
    static_assert(kBins % (kThreads * 4) == 0);
#pragma unroll
    for (int i = 0; i < kBins; i += kThreads * 4) {
      reinterpret_cast<uint4*>(smem.histogram + i)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    }
  }

  // A floor that about `kept` candidates reach, and rather more; not many more than `comfortable`,
  // but for those that equal it. By all threads of a CTA, after a barrier.
  __device__ ScoreFloor find(const CandidateSpan& span, uint32_t kept, uint32_t comfortable,
                             SharedStorage& smem) {
    const uint32_t rounds = rounds_of(span);
    const uint32_t sampled = rounds * kVectors * kVectorScores;
    float scale = 1.0f;  // candidates that a sample stands for
    uint32_t wanted = kept;
    if (span.num_vectors() > kVectors) {
      scale = static_cast<float>(span.size()) / sampled;
      const float expected = kept / scale;
      wanted = static_cast<uint32_t>(expected + 3.0f * sqrtf(expected) + 8.0f);
    }
    wanted = min(wanted, sampled);
    // Leading bits of the order, of which more are taken only where too many share them.
    int shift = 20;
    int bits = 12;
    uint32_t missing = wanted;
    uint32_t order = 0;
    while (true) {
      for (uint32_t round = 0; round < rounds; ++round) {
        if (rounds > 1) load(span, round);
        count(order, shift, bits, smem);
      }
      __syncthreads();
      const DigitChoice choice = choose(missing, smem);
      order |= choice.bin << shift;
      missing = choice.missing;
      // Nothing but NaN lies below -inf.
      constexpr uint32_t kMinusInfinity = 0x007fffff;
      const bool fits = scale * (wanted - missing + choice.bucket) <= comfortable;
      if (fits) return {order <= kMinusInfinity ? 0 : order, false};
      if (shift == 0) return {order, true};
      bits = shift == 20 ? 12 : 8;
      shift -= bits;
    }
  }

 private:
  static constexpr uint32_t kVectors = kThreads < 1024 ? 512 : 1024;  // of a round
  static constexpr int kOwn = kVectors / kThreads;

  // More rounds for long lists: the list of keys has room for a limited error.
  static __device__ uint32_t rounds_of(const CandidateSpan& span) {
    constexpr uint32_t kVectorsOfRound = 1 << 16;
    return max(1u, min(4u, span.num_vectors() / kVectorsOfRound));
  }

  // Vectors spread evenly over the list, each somewhere in its stretch; all where there are few.
  __device__ void load(const CandidateSpan& span, uint32_t round) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint32_t index = i * kThreads + threadIdx.x;
      const uint32_t jitter = (index * 4 + round) * 2654435761u >> 22;
      const uint64_t place = uint64_t{index << 10 | jitter} * span.num_vectors() / (kVectors << 10);
      const bool all = span.num_vectors() <= kVectors;
      const uint32_t vector = all ? index : static_cast<uint32_t>(place);
      samples_[i] = make_float4(-NAN, -NAN, -NAN, -NAN);  // the last of all
      if (vector < span.num_vectors()) samples_[i] = span.load(span.first_vector() + vector);
    }
  }

  // Counts the next `bits` of the samples whose order begins as `prefix`.
  __device__ void count(uint32_t prefix, int shift, int bits, SharedStorage& smem) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float score[kVectorScores] = {samples_[i].x, samples_[i].y, samples_[i].z,
                                          samples_[i].w};
#pragma unroll
      for (uint32_t j = 0; j < kVectorScores; ++j) {
        const uint32_t bin = (score_order(score[j]) ^ prefix) >> shift;
        // Rows of equal scores would queue up at one counter.
        const bool all_equal = __all_sync(kWholeWarp, bin == __shfl_sync(kWholeWarp, bin, 0)) != 0;
        if (bin >> bits != 0 || (all_equal && threadIdx.x % kWarpThreads != 0)) continue;
        atomicAdd(&smem.histogram[bin], all_equal ? kWarpThreads : 1);
      }
    }
  }

  // The bin with the `missing`-th best sample. Clears the counts.
  static __device__ DigitChoice choose(uint32_t missing, SharedStorage& smem) {
    constexpr int kBinsPerThread = kBins / kThreads;
    const int first = kBins - kBinsPerThread * (1 + threadIdx.x);
    uint32_t counts[kBinsPerThread];
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; i += 4) {
      auto& four = *reinterpret_cast<uint4*>(smem.histogram + first + i);
      reinterpret_cast<uint4&>(counts[i]) = four;
      four = make_uint4(0, 0, 0, 0);
      sum += counts[i] + counts[i + 1] + counts[i + 2] + counts[i + 3];
    }
    uint32_t above = block_exclusive_sum<kThreads>(sum, smem.warp_totals);
    if (above < missing && missing <= above + sum) {
#pragma unroll
      for (int i = kBinsPerThread - 1; i >= 0; --i) {
        if (above < missing && missing <= above + counts[i]) {
          smem.choice = {static_cast<uint32_t>(first + i), missing - above, counts[i]};
        }
        above += counts[i];
      }
    }
    __syncthreads();
    return smem.choice;
  }

  float4 samples_[kOwn];
};

}  // namespace attnsieve::sm80
