// Computes        As kernel.cuh, in one sweep: a sample of the scores gives a floor under the cut,
//                 the candidates at or above it are listed, and the list holds the exact cut.
// Roles           The CTAs of Ranks, one or a cluster, own a list of scores. Each samples all of it,
//                 which is cheaper than an exchange, and lists its share of the candidates with rank
//                 0, which does the rest.
// Shared memory   KeyList (76 KB); its keys lie over the histogram of the sample. A bit for each
//                 candidate, behind it.
// Invariants      The result is exact whatever was sampled: where the list turned out shorter than
//                 wanted or longer than its capacity, nothing was written and run() says so.
// Not handled     Those lists, mostly rows of few distinct scores, and lists of more candidates than
//                 there is shared memory for bits: the radix descent.
#pragma once

#include "cuda/sm80/select_tokens/key_list.cuh"
#include "cuda/sm80/select_tokens/write.cuh"

namespace attnsieve::sm80 {

// One CTA owns a list.
struct OneCta {
  static constexpr int kCount = 1;
  __device__ static int rank() { return 0; }
  __device__ static uint32_t list() { return blockIdx.x; }
  __device__ static void sync() { __syncthreads(); }
  template <class T>
  __device__ static T* of_rank_0(T* pointer) {
    return pointer;
  }
};

struct SampledStorage {
  static constexpr int kSampleBins = 4096;

  union {
    KeyList list;
    uint32_t sample[kSampleBins];
  };
  uint32_t floor;
  bool too_many;  // as the sample says
  uint32_t marks[];  // a bit a candidate, words of 32 positions
};
static_assert(sizeof(SampledStorage::sample) <= offsetof(KeyList, histogram));

// Shared memory for lists of `columns`.
constexpr size_t sampled_bytes(int64_t columns) {
  return sizeof(SampledStorage) + static_cast<size_t>(columns / kWarpThreads + 2) * 4;
}

template <int kThreads, class Ranks>
class SampledSelector {
 public:
  __device__ SampledSelector(const TokenSelectProblem& problem, SampledStorage& smem)
      : problem_(problem), smem_(smem) {}

  // False, in all ranks, where the list has to be searched otherwise.
  __device__ bool run() {
    const ScoreList list(problem_, Ranks::list());
    CutSearch search(list);
    const bool threshold = list.has_threshold();
    if (threshold && list.limit == kNoOrder) search.start(list, 0);
    if (search.found) {
      write_rest(list, search, Ranks::rank() * kThreads + threadIdx.x, Ranks::kCount * kThreads);
      return true;
    }
    locate(list);
    clear();
    float4 scores[kInFlight];
    if (threshold) {
      load_first(scores);
      smem_.floor = list.limit + 1;
      Ranks::sync();
    } else {
      float4 samples[kSamples];
      load_sample(samples);
      load_first(scores);
      __syncthreads();
      find_floor(samples, search.kept);
      Ranks::sync();
      if (smem_.too_many) return false;
    }
    collect(scores);
    Ranks::sync();
    return finish(*Ranks::of_rank_0(&smem_.list.size));
  }

 private:
  static constexpr uint32_t kVector = 4;  // scores of a load
  static constexpr int kInFlight = 8;  // loads of a thread: a mask of 32 bits
  static constexpr int kSampleVectors = 1024;
  static constexpr int kSamples = kSampleVectors / kThreads;
  static constexpr int kSampleShift = 20;  // of an order
  static constexpr uint32_t kChunk = kThreads * kInFlight;
  static constexpr uint32_t kMinusInfinity = 0x007fffff;  // its order
  static constexpr float kNothing = -NAN;  // ranks below every floor but 0

  // Candidates that fill a vector, aligned in memory, and up to three before and behind them.
  __device__ void locate(const ScoreList& list) {
    scores_ = list.scores;
    begin_ = static_cast<uint32_t>(list.candidates.begin);
    end_ = static_cast<uint32_t>(list.candidates.end);
    lead_ = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(scores_) / sizeof(float) % kVector);
  }

  __device__ uint32_t first_vector() const { return (begin_ + lead_ + kVector - 1) / kVector; }
  __device__ uint32_t num_vectors() const {
    return max((end_ + lead_) / kVector, first_vector()) - first_vector();
  }

  // Writes the result of a list with `listed` candidates at or above the floor.
  __device__ bool finish(uint32_t listed) {
    // Once more, not kept in registers meanwhile.
    const ScoreList list(problem_, Ranks::list());
    CutSearch search(list);
    if (list.has_threshold()) search.start(list, listed);
    if (listed > kKeyCapacity || listed < search.kept) return false;
    if (Ranks::rank() > 0) return true;
    if (must_mark(list, search)) write_listed(list, search.kept);
    write_rest(list, search, threadIdx.x, kThreads);
    return true;
  }

  __device__ const float4* vectors() const {
    return reinterpret_cast<const float4*>(scores_ - lead_);
  }

  // Vectors of this rank.
  struct Share {
    uint32_t begin;
    uint32_t end;
  };

  __device__ Share share_of_rank() const {
    const uint32_t share = (num_vectors() + Ranks::kCount - 1) / Ranks::kCount;
    const uint32_t begin = min(Ranks::rank() * share, num_vectors());
    return {first_vector() + begin, first_vector() + min(begin + share, num_vectors())};
  }

  __device__ void clear() {
    static_assert(SampledStorage::kSampleBins % (kThreads * 4) == 0);
    const uint4 zero = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; i < SampledStorage::kSampleBins / 4; i += kThreads) {
      reinterpret_cast<uint4*>(smem_.sample)[i] = zero;
    }
    KeyList& list = smem_.list;
    for (int i = threadIdx.x; i < KeyList::kBins / 4; i += kThreads) {
      reinterpret_cast<uint4*>(list.histogram)[i] = zero;
    }
    if (Ranks::rank() == 0) {
      for (uint32_t i = threadIdx.x; i < mark_words(); i += kThreads) smem_.marks[i] = 0;
    }
    if (threadIdx.x == 0) list.max = list.size = list.num_pairs = 0;
  }

  __device__ uint32_t mark_words() const { return end_ / kWarpThreads - begin_ / kWarpThreads + 1; }

  __device__ void load(uint32_t begin, uint32_t end, float4 (&scores)[kInFlight]) const {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t vector = begin + i * kThreads + threadIdx.x;
      scores[i] = make_float4(kNothing, kNothing, kNothing, kNothing);
      if (vector < end) scores[i] = __ldg(vectors() + vector);
    }
  }

  __device__ void load_first(float4 (&scores)[kInFlight]) const {
    const Share share = share_of_rank();
    load(share.begin, share.end, scores);
  }

  // Vectors spread evenly over the list, each somewhere in its stretch; all where there are few.
  __device__ void load_sample(float4 (&samples)[kSamples]) const {
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      const uint32_t index = i * kThreads + threadIdx.x;
      const uint32_t jitter = index * 2654435761u >> 22;
      const uint64_t place = uint64_t{index << 10 | jitter} * num_vectors() >> 20;
      const uint32_t vector = samples_all() ? index : static_cast<uint32_t>(place);
      samples[i] = make_float4(kNothing, kNothing, kNothing, kNothing);
      if (vector < num_vectors()) samples[i] = __ldg(vectors() + first_vector() + vector);
    }
  }

  __device__ bool samples_all() const { return num_vectors() <= kSampleVectors; }

  // A floor that about as many candidates as wanted reach, and rather more.
  __device__ void find_floor(const float4 (&samples)[kSamples], uint32_t kept) {
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      const float score[kVector] = {samples[i].x, samples[i].y, samples[i].z, samples[i].w};
#pragma unroll
      for (uint32_t j = 0; j < kVector; ++j) {
        const uint32_t bin = score_order(score[j]) >> kSampleShift;
        // Rows of equal scores would queue up at one counter.
        int all_equal = 0;
        __match_all_sync(kWholeWarp, bin, &all_equal);
        if (all_equal == 0) {
          atomicAdd(&smem_.sample[bin], 1u);
        } else if (threadIdx.x % kWarpThreads == 0) {
          atomicAdd(&smem_.sample[bin], uint32_t{kWarpThreads});
        }
      }
    }
    const float ranked = static_cast<float>(end_ - begin_);
    const float sampled = samples_all() ? ranked : static_cast<float>(kSampleVectors * kVector);
    const float share = sampled / ranked;
    uint32_t wanted = kept;
    if (!samples_all()) {
      const float expected = kept * share;
      wanted = static_cast<uint32_t>(expected + 3.0f * sqrtf(expected) + 8.0f);
    }
    __syncthreads();
    constexpr int kBinsPerThread = SampledStorage::kSampleBins / kThreads;
    const int top =
        SampledStorage::kSampleBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
    uint32_t counts[kBinsPerThread];
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) sum += counts[i] = smem_.sample[top - i];
    uint32_t above = block_exclusive_sum<kThreads>(sum, smem_.list.warp_totals);
    if (threadIdx.x == kThreads - 1 && above + sum < wanted) set_floor(0, ranked);
    if (above >= wanted || wanted > above + sum) return;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (above < wanted && wanted <= above + counts[i]) {
        set_floor(static_cast<uint32_t>(top - i) << kSampleShift, (above + counts[i]) / share);
      }
      above += counts[i];
    }
  }

  __device__ void set_floor(uint32_t floor, float expected) {
    // Nothing but NaN lies below -inf.
    smem_.floor = floor <= kMinusInfinity ? 0 : floor;
    if (smem_.floor == 0) expected = static_cast<float>(end_ - begin_);
    smem_.too_many = expected > 1.25f * kKeyCapacity;
  }

  // Lists the candidates of the share that reach the floor.
  __device__ void collect(float4 (&scores)[kInFlight]) {
    const Share share = share_of_rank();
    const uint32_t floor = smem_.floor;
    const float least =
        __uint_as_float((floor & 0x80000000u) != 0 ? floor ^ 0x80000000u : ~floor);
    const bool all = floor == 0;  // NaN as well
    if (Ranks::rank() == 0 && threadIdx.x < kWarpThreads) collect_edges(least, all);
    for (uint32_t chunk = share.begin; chunk < share.end; chunk += kChunk) {
      uint32_t mask = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const uint32_t nibble =
            uint32_t{scores[i].x >= least} | uint32_t{scores[i].y >= least} << 1 |
            uint32_t{scores[i].z >= least} << 2 | uint32_t{scores[i].w >= least} << 3;
        const bool inside = chunk + i * kThreads + threadIdx.x < share.end;
        mask |= (all && inside ? 15u : nibble) << i * kVector;
      }
      if (chunk + kChunk < share.end) load(chunk + kChunk, share.end, scores);
      append(mask, [&](uint32_t bit) {
        const uint32_t vector = chunk + bit / kVector * kThreads + threadIdx.x;
        return vector * kVector + bit % kVector - lead_;
      });
    }
  }

  // Candidates that do not fill a vector, by the lanes of a warp.
  __device__ void collect_edges(float least, bool all) {
    const uint32_t lane = threadIdx.x;
    const uint32_t behind = (first_vector() + num_vectors()) * kVector - lead_;
    const uint32_t before = min(end_, first_vector() * kVector - lead_) - begin_;
    const uint32_t position = lane < before ? begin_ + lane : behind + lane - before;
    const bool listed = position < end_ && (all || __ldg(scores_ + position) >= least);
    append(listed, [&](uint32_t) { return position; });
  }

  // Adds the candidates of a thread's mask to the list.
  template <class PositionOf>
  __device__ __forceinline__ void append(uint32_t mask, PositionOf&& position_of) {
    const uint32_t lane = threadIdx.x % kWarpThreads;
    const uint32_t count = __popc(mask);
    uint32_t slot = count;
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      const uint32_t before = __shfl_up_sync(kWholeWarp, slot, distance);
      if (lane >= static_cast<uint32_t>(distance)) slot += before;
    }
    uint32_t base = 0;
    if (lane == kWarpThreads - 1 && slot > 0) {
      base = atomicAdd(Ranks::of_rank_0(&smem_.list.size), slot);
    }
    slot += __shfl_sync(kWholeWarp, base, kWarpThreads - 1) - count;
    CandidateKey* const keys = Ranks::of_rank_0(smem_.list.keys);
#pragma unroll 1
    for (; mask != 0 && slot < kKeyCapacity; mask &= mask - 1, ++slot) {
      const uint32_t position = position_of(__ffs(mask) - 1);
      const uint32_t order = score_order(__ldg(scores_ + position));  // a second time
      keys[slot] = candidate_key(order, end_ - 1 - position);
    }
  }

  // Writes the kept candidates of the list in ascending order.
  __device__ void write_listed(const ScoreList& scores, uint32_t kept) {
    KeyList& list = smem_.list;
    const uint32_t size = list.size;
    CandidateKey cut = 0;
    if (kept < size) {
      const int position_bits = bit_width(end_ - begin_);
      cut = list.find_cut<kThreads>(kept, smem_.floor, position_bits);
    }
    const uint32_t base = begin_ / kWarpThreads * kWarpThreads;
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const CandidateKey key = list.keys[i];
      if (key < cut) continue;
      const uint32_t bit = end_ - 1 - static_cast<uint32_t>(key) - base;
      atomicOr(&smem_.marks[bit / kWarpThreads], 1u << bit % kWarpThreads);
    }
    __syncthreads();
    // Kept positions in order, where the keys were.
    auto* const positions = reinterpret_cast<uint32_t*>(list.keys);
    const uint32_t words = (mark_words() + kThreads - 1) / kThreads;
    const uint32_t first = min(threadIdx.x * words, mark_words());
    const uint32_t last = min(first + words, mark_words());
    uint32_t marked = 0;
    for (uint32_t word = first; word < last; ++word) marked += __popc(smem_.marks[word]);
    uint32_t slot = block_exclusive_sum<kThreads>(marked, list.warp_totals);
    for (uint32_t word = first; word < last; ++word) {
      for (uint32_t bits = smem_.marks[word]; bits != 0; bits &= bits - 1) {
        positions[slot++] = base + word * kWarpThreads + __ffs(bits) - 1;
      }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kept; i += kThreads) {
      scores.write(begin_ + i, positions[i]);
    }
  }

  const TokenSelectProblem& problem_;
  SampledStorage& smem_;
  const float* scores_;
  uint32_t begin_;  // ranked candidates
  uint32_t end_;
  uint32_t lead_;  // scores of vector 0 before the list
};

}  // namespace attnsieve::sm80
