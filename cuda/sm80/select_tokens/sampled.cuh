// Computes        As kernel.cuh, in one sweep: a sample of the scores gives a floor under the cut,
//                 the candidates at or above it are listed, and the list holds the exact cut.
//                 Where too many equal the floor, those above it are listed, and the first that
//                 equal it fill the rest.
// Roles           The CTAs of Ranks, one or a cluster, own a list of scores. Each samples all of it,
//                 which is cheaper than an exchange, and lists its share of the candidates with rank
//                 0, which does the rest.
// Shared memory   KeyList (76 KB); its keys lie over the histogram of the sample. A bit for each
//                 candidate, behind it.
// Invariants      The result is exact whatever was sampled: where the list turned out shorter than
//                 wanted or longer than its capacity, nothing was written and run() says so.
// Not handled     Those lists, and lists of more candidates than there is shared memory for bits: the
//                 radix descent.
#pragma once

#include "cuda/sm80/select_tokens/floor.cuh"
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
  using FloorStorage = FloorSample<1024>::SharedStorage;  // the same for any number of threads

  union {
    KeyList list;
    FloorStorage floor_sample;
  };
  ListPlace place;
  CandidateSpan span;
  uint32_t kept;  // top-k rule
  ScoreFloor floor;
  uint32_t marks[];  // a bit a candidate, in words
};
static_assert(sizeof(SampledStorage::FloorStorage) <= offsetof(KeyList, histogram));

// Shared memory for lists of `columns`.
constexpr size_t sampled_bytes(int64_t columns) {
  return sizeof(SampledStorage) + static_cast<size_t>(columns / kWarpThreads + 2) * 4;
}

template <int kThreads, class Ranks>
class SampledSelector {
 public:
  __device__ SampledSelector(const SelectTokensArguments& arguments, SampledStorage& smem)
      : arguments_(arguments), smem_(smem) {}

  // False, in all ranks, where the list has to be searched otherwise.
  __device__ bool run() {
    float4 scores[kInFlight];
    {
      const ScoreList list(arguments_, Ranks::list());
      CutSearch search(list);
      const bool threshold = list.has_threshold();
      if (threshold && list.limit == kNoOrder) search.start(list, 0);
      if (search.found) {
        write_rest(list, search, Ranks::rank() * kThreads + threadIdx.x, Ranks::kCount * kThreads);
        return true;
      }
      if (!threshold && search.kept > kKeyCapacity) return false;
      const CandidateSpan span(list);
      if (threadIdx.x == 0) {
        smem_.place = list;  // read from there, not kept in registers
        smem_.span = span;
        smem_.kept = search.kept;
        smem_.floor = {list.limit + 1, false};
      }
      if (threshold) {
        load_first(span, scores);
        clear(span);
      } else {
        FloorSample<kThreads> sample(span);
        load_first(span, scores);
        clear(span);
        __syncthreads();
        find_floor(sample);
      }
    }
    Ranks::sync();
    collect(scores);
    Ranks::sync();
    return finish(*Ranks::of_rank_0(&smem_.list.size), *Ranks::of_rank_0(&smem_.list.num_equal));
  }

 private:
  static constexpr int kInFlight = 8;  // loads of a thread: a mask of 32 bits
  static constexpr uint32_t kChunk = kThreads * kInFlight;
  // Orders are read a second time: by the ranks as they list, or by one CTA when all are listed.
  static constexpr bool kOrdersLater = Ranks::kCount == 1;

  static __device__ uint32_t order_at(const CandidateSpan& span, uint32_t position) {
    return score_order(__ldg(span.scores + position));
  }

  __device__ void clear(const CandidateSpan& span) {
    FloorSample<kThreads>::clear(floor_storage());
    smem_.list.template clear<kThreads>();
    if (Ranks::rank() > 0) return;
    for (uint32_t i = threadIdx.x; i < span.num_words(); i += kThreads) smem_.marks[i] = 0;
  }

  __device__ auto& floor_storage() {
    using Storage = typename FloorSample<kThreads>::SharedStorage;
    static_assert(sizeof(Storage) == sizeof(SampledStorage::FloorStorage));
    return reinterpret_cast<Storage&>(smem_.floor_sample);
  }

  __device__ void find_floor(FloorSample<kThreads>& sample) {
    constexpr uint32_t kComfortable = kKeyCapacity * 3 / 4;
    const ScoreFloor floor = sample.find(smem_.span, smem_.kept, kComfortable, floor_storage());
    if (threadIdx.x == 0) smem_.floor = floor;
  }

  // Vectors [begin, end).
  struct Share {
    uint32_t begin;
    uint32_t end;
  };

  // Those of this rank: whole words.
  static __device__ Share share_of_rank(const CandidateSpan& span) {
    const uint32_t first = span.first_vector() / kWordVectors;
    const uint32_t last =
        (span.first_vector() + span.num_vectors() + kWordVectors - 1) / kWordVectors;
    const uint32_t share = (last - first + Ranks::kCount - 1) / Ranks::kCount;
    const uint32_t begin = min(first + Ranks::rank() * share, last);
    return {begin * kWordVectors, min(begin + share, last) * kWordVectors};
  }

  // Behind the list its last vector: see held_mask().
  static __device__ void load(const CandidateSpan& span, const Share& rest,
                              float4 (&scores)[kInFlight]) {
    if (span.num_vectors() == 0) return;
    const uint32_t last = span.first_vector() + span.num_vectors() - 1;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t vector = rest.begin + i * kThreads + threadIdx.x;
      scores[i] = span.load(max(span.first_vector(), min(vector, last)));
    }
  }

  // Four bits for each of this thread's vectors that is in the share and in the list.
  static __device__ uint32_t held_mask(const CandidateSpan& span, const Share& rest) {
    const uint32_t first = rest.begin + threadIdx.x;
    const uint32_t end = min(rest.end, span.first_vector() + span.num_vectors());
    const uint32_t held = first < end ? (end - first + kThreads - 1) / kThreads : 0;
    const uint32_t up_to_end = held < kInFlight ? (1u << held * kVectorScores) - 1 : ~0u;
    return first < span.first_vector() ? up_to_end & ~15u : up_to_end;
  }

  static __device__ void load_first(const CandidateSpan& span, float4 (&scores)[kInFlight]) {
    load(span, share_of_rank(span), scores);
  }

  // Lists the candidates of the share that reach the floor.
  __device__ void collect(float4 (&scores)[kInFlight]) {
    const CandidateSpan span = smem_.span;
    const ScoreFloor floor = smem_.floor;
    const float least = floor.least();
    if (Ranks::rank() == 0 && threadIdx.x < kWarpThreads) collect_edges(span, floor);
    for (Share rest = share_of_rank(span); rest.begin < rest.end; rest.begin += kChunk) {
      uint32_t mask = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        mask |= nibble(scores[i], [least](float x) { return x >= least; }) << i * kVectorScores;
      }
      const uint32_t held = held_mask(span, rest);
      mask = floor.order == 0 ? held : mask & held;  // everything, NaN as well, reaches 0
      if (floor.equal_apart) mask ^= mark_equal(span, rest.begin, held, scores, least);
      if (rest.begin + kChunk < rest.end) load(span, {rest.begin + kChunk, rest.end}, scores);
      append(span, mask, [&](uint32_t bit) {
        const uint32_t vector = rest.begin + bit / kVectorScores * kThreads + threadIdx.x;
        return vector * kVectorScores + bit % kVectorScores - span.lead;
      });
    }
  }

  template <class Test>
  static __device__ uint32_t nibble(const float4& scores, Test&& test) {
    return uint32_t{test(scores.x)} | uint32_t{test(scores.y)} << 1 |
           uint32_t{test(scores.z)} << 2 | uint32_t{test(scores.w)} << 3;
  }

  // Marks candidates equal to the floor; returns their mask.
  __device__ uint32_t mark_equal(const CandidateSpan& span, uint32_t chunk, uint32_t held,
                                 const float4 (&scores)[kInFlight], float value) {
    uint32_t* const marks = Ranks::of_rank_0(smem_.marks);
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t equal =
          nibble(scores[i], [value](float x) { return x == value; }) & held >> i * kVectorScores;
      mask |= equal << i * kVectorScores;
      const uint32_t vector = chunk + i * kThreads + threadIdx.x;
      uint32_t word = equal << vector % kWordVectors * kVectorScores;
#pragma unroll
      for (int distance = 1; distance < static_cast<int>(kWordVectors); distance *= 2) {
        word |= __shfl_xor_sync(kWholeWarp, word, distance);
      }
      if (word != 0 && vector % kWordVectors == 0) {
        atomicOr(&marks[vector / kWordVectors - span.first_word()], word);
      }
    }
    add_equal(__popc(mask));
    return mask;
  }

  __device__ void add_equal(uint32_t count) {
    count = __reduce_add_sync(kWholeWarp, count);
    if (count > 0 && threadIdx.x % kWarpThreads == 0) {
      atomicAdd(Ranks::of_rank_0(&smem_.list.num_equal), count);
    }
  }

  // Candidates that do not fill a vector, by the lanes of rank 0's first warp.
  __device__ void collect_edges(const CandidateSpan& span, const ScoreFloor& floor) {
    const uint32_t lane = threadIdx.x;
    const uint32_t behind = (span.first_vector() + span.num_vectors()) * kVectorScores - span.lead;
    const uint32_t before =
        min(span.end, span.first_vector() * kVectorScores - span.lead) - span.begin;
    const uint32_t position = lane < before ? span.begin + lane : behind + lane - before;
    const bool exists = position < span.end;
    const float score = exists ? __ldg(span.scores + position) : -NAN;
    const bool equal = floor.equal_apart && score == floor.least();
    if (equal) set_mark(span, position);
    add_equal(equal);
    const bool listed = !equal && (score >= floor.least() || (floor.order == 0 && exists));
    append(span, listed, [&](uint32_t) { return position; });
  }

  __device__ void set_mark(const CandidateSpan& span, uint32_t position) {
    const uint32_t bit = position + span.lead - span.first_word() * kWarpThreads;
    atomicOr(&smem_.marks[bit / kWarpThreads], 1u << bit % kWarpThreads);
  }

  // Adds the candidates of a thread's mask to the list.
  template <class PositionOf>
  __device__ __forceinline__ void append(const CandidateSpan& span, uint32_t mask,
                                         PositionOf&& position_of) {
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
      const uint32_t before_end = span.end - 1 - position;
      if constexpr (kOrdersLater) {
        KeyList::put(keys[slot], before_end);
      } else {
        keys[slot] = candidate_key(order_at(span, position), before_end);
      }
    }
  }

  // Writes the result of a list with `listed` candidates above the floor, or at it where `equal`
  // are marked instead.
  __device__ bool finish(uint32_t listed, uint32_t equal) {
    const ScoreList list(arguments_, smem_.place);
    CutSearch search(list);
    if (list.has_threshold()) search.start(list, listed);
    if (listed > kKeyCapacity || listed + equal < search.kept) return false;
    if (Ranks::rank() > 0) return true;
    if (must_mark(list, search)) {
      keep_equal(search.kept - min(listed, search.kept));
      mark_listed(search.kept);
      write_marked(list, search.kept);
    }
    write_rest(list, search, threadIdx.x, kThreads);
    return true;
  }

  struct Words {
    uint32_t begin;
    uint32_t end;
  };

  __device__ Words words_of_thread() const {
    const uint32_t all = smem_.span.num_words();
    const uint32_t words = (all + kThreads - 1) / kThreads;
    const uint32_t begin = min(threadIdx.x * words, all);
    return {begin, min(begin + words, all)};
  }

  __device__ uint32_t marks_before(const Words& words) {
    uint32_t marked = 0;
    for (uint32_t word = words.begin; word < words.end; ++word) {
      marked += __popc(smem_.marks[word]);
    }
    return block_exclusive_sum<kThreads>(marked, smem_.list.warp_totals);
  }

  // Of the candidates equal to the floor, the first `kept` stay marked.
  __device__ void keep_equal(uint32_t kept) {
    if (!smem_.floor.equal_apart) return;
    const Words words = words_of_thread();
    uint32_t before = marks_before(words);
    for (uint32_t word = words.begin; word < words.end; ++word) {
      uint32_t bits = smem_.marks[word];
      uint32_t rest = bits;
      for (; rest != 0 && before < kept; rest &= rest - 1) ++before;
      smem_.marks[word] = bits ^ rest;
    }
    __syncthreads();
  }

  __device__ void mark_listed(uint32_t kept) {
    const CandidateSpan span = smem_.span;
    KeyList& list = smem_.list;
    const uint32_t size = list.size;
    CandidateKey cut = 0;
    if (kept < size) {
      const uint32_t floor = smem_.floor.order + (smem_.floor.equal_apart ? 1 : 0);
      const auto order_of = [&](CandidateKey key) {
        if constexpr (!kOrdersLater) return static_cast<uint32_t>(key >> kOrderShift);
        return order_at(span, span.end - 1 - static_cast<uint32_t>(key));
      };
      list.template set_orders<kThreads>(order_of);
      cut = list.template find_cut<kThreads>(kept, floor, bit_width(span.size()));
    }
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const CandidateKey key = list.keys[i];
      if (key >= cut) set_mark(span, span.end - 1 - static_cast<uint32_t>(key));
    }
    __syncthreads();
  }

  // Writes the marked candidates in ascending order.
  __device__ void write_marked(const ScoreList& list, uint32_t kept) {
    auto* const positions = reinterpret_cast<uint32_t*>(smem_.list.keys);  // were used
    const CandidateSpan span = smem_.span;
    const Words words = words_of_thread();
    uint32_t slot = marks_before(words);
    for (uint32_t word = words.begin; word < words.end; ++word) {
      for (uint32_t bits = smem_.marks[word]; bits != 0; bits &= bits - 1) {
        positions[slot++] = (span.first_word() + word) * kWarpThreads + __ffs(bits) - 1 - span.lead;
      }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kept; i += kThreads)
      list.write(span.begin + i, positions[i]);
  }

  const SelectTokensArguments& arguments_;
  SampledStorage& smem_;
};

}  // namespace attnsieve::sm80
