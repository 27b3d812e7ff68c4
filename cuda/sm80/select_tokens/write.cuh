// Writes the kept candidates of a list in ascending order.
#pragma once

#include "cuda/sm80/select_tokens/search.cuh"

namespace attnsieve::sm80 {

// Candidates above and at the cut: in lane i those of the warp's word i.
struct WordMarks {
  uint32_t above = 0;
  uint32_t equal = 0;

  // Both counts in one integer. A CTA marks at most 2^15 candidates at a time: sums do not overflow.
  __device__ uint32_t counts() const { return __popc(above) | __popc(equal) << 16; }
};

__device__ __forceinline__ uint32_t above_of(uint32_t counts) { return counts & 0xffff; }
__device__ __forceinline__ uint32_t equal_of(uint32_t counts) { return counts >> 16; }

// Marks of the ranked candidates in the `words` <= 32 words from `first` on. Fewer words in flight need
// fewer registers.
template <int kWordsInFlight = 4>
__device__ __forceinline__ WordMarks mark_words(const ScoreList& list, const ScoreCut& cut,
                                                uint32_t first, uint32_t words) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  const uint32_t begin = static_cast<uint32_t>(list.candidates.begin);
  const uint32_t end =
      min(static_cast<uint32_t>(list.candidates.end), (first + words) * kWarpThreads);
  WordMarks marks;
  for_each_word<kWordsInFlight>(
      list.scores, begin, end, first, 1, [&](uint32_t position, bool inside, uint32_t order) {
        const unsigned above = __ballot_sync(kWholeWarp, inside && order > cut.order);
        const unsigned equal = __ballot_sync(kWholeWarp, inside && order == cut.order);
        if (position / kWarpThreads - first == lane) marks = {above, equal};
      });
  return marks;
}

// Writes what is marked, of the candidates at the cut the first cut.equals. above_before and
// equal_before: marks of the list before this lane's word.
__device__ __forceinline__ void write_words(const ScoreList& list, const ScoreCut& cut,
                                            uint32_t first, const WordMarks& marks,
                                            uint32_t above_before, uint32_t equal_before) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  const uint32_t before = (1u << lane) - 1;
  const bool some = marks.above != 0 || (marks.equal != 0 && equal_before < cut.equals);
  for (unsigned todo = __ballot_sync(kWholeWarp, some); todo != 0; todo &= todo - 1) {
    const int owner = __ffs(todo) - 1;
    const uint32_t above = __shfl_sync(kWholeWarp, marks.above, owner);
    const uint32_t equal = __shfl_sync(kWholeWarp, marks.equal, owner);
    const uint32_t above_first = __shfl_sync(kWholeWarp, above_before, owner);
    const uint32_t equal_first = __shfl_sync(kWholeWarp, equal_before, owner);
    const uint32_t rank = equal_first + __popc(equal & before);
    const bool keep = (above >> lane & 1) != 0 || ((equal >> lane & 1) != 0 && rank < cut.equals);
    const unsigned kept = __ballot_sync(kWholeWarp, keep);
    const uint32_t slot = static_cast<uint32_t>(list.candidates.begin) + above_first +
                          min(equal_first, cut.equals) + __popc(kept & before);
    if (keep) list.write(slot, (first + owner) * kWarpThreads + lane);
  }
}

// Writes the forced entries, all others where nothing is cut off, the padding and the counts.
// `thread` of `threads` share the work.
__device__ __forceinline__ void write_rest(const ScoreList& list, const CutSearch& search,
                                           uint32_t thread, uint32_t threads) {
  const TokenSelectProblem& problem = list.problem;
  const uint32_t ranked = static_cast<uint32_t>(list.candidates.ranked());
  const uint32_t forced = static_cast<uint32_t>(list.candidates.forced());
  const uint32_t begin = static_cast<uint32_t>(list.candidates.begin);
  const uint32_t end = begin + search.kept;
  for (uint32_t slot = thread; slot < static_cast<uint32_t>(problem.capacity); slot += threads) {
    if (slot >= forced + search.kept) {
      problem.indices[list.flat * problem.capacity + slot] = -1;
    } else if (slot >= end) {
      list.write(slot, slot - search.kept + ranked);
    } else if (slot < begin || search.kept == ranked) {
      list.write(slot, slot);
    }
  }
  if (thread > 0) return;
  problem.counts[list.flat] = static_cast<int32_t>(forced + search.kept);
  if (problem.passed != nullptr) {
    problem.passed[list.flat] = static_cast<int32_t>(forced + search.wanted);
  }
}

// Whether the kept candidates have to be told from the others by their scores.
__device__ __forceinline__ bool must_mark(const ScoreList& list, const CutSearch& search) {
  return search.kept > 0 && search.kept < static_cast<uint32_t>(list.candidates.ranked());
}

}  // namespace attnsieve::sm80
