// One list of scores as a CTA sees it, and the sweep over its candidates.
#pragma once

#include <cutlass/fast_math.h>

#include "attnsieve/token_select.h"
#include "cuda/common/numeric.cuh"
#include "cuda/common/score_order.cuh"

namespace attnsieve::sm80 {

inline constexpr uint32_t kNoOrder = 0xffffffffu;  // above the order of every score
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// What the host hands the kernels.
struct SelectTokensArguments {
  TokenSelectProblem problem;
  cutlass::FastDivmod by_lists;  // of the lists of a row
  cutlass::FastDivmod by_rows;  // of the rows of a sequence
  bool sampled;
};

inline SelectTokensArguments make_arguments(const TokenSelectProblem& problem, bool sampled) {
  return {problem, cutlass::FastDivmod(static_cast<int>(problem.num_lists)),
          cutlass::FastDivmod(static_cast<int>(problem.seqlen_q)), sampled};
}

// Where a list lies among all and in memory, and what it ranges over.
struct ListPlace {
  const float* scores;
  int64_t batch;
  int64_t flat;  // among all lists
  TokenCandidates candidates;
  uint32_t limit;  // threshold rule: orders above it pass
};

struct ScoreList : ListPlace {
  const TokenSelectProblem& problem;

  __device__ ScoreList(const SelectTokensArguments& arguments, const ListPlace& place)
      : ListPlace(place), problem(arguments.problem) {}

  __device__ ScoreList(const SelectTokensArguments& arguments, uint32_t list_of_all)
      : problem(arguments.problem) {
    const TokenSelectProblem& p = problem;
    int row_of_all = 0;
    int list = 0;
    int sequence = 0;
    int row = 0;
    arguments.by_lists(row_of_all, list, static_cast<int>(list_of_all));
    arguments.by_rows(sequence, row, row_of_all);
    flat = list_of_all;
    batch = sequence;
    scores = p.scores + batch * p.scores_stride_batch + row * p.scores_stride_row +
             list * p.scores_stride_head;
    candidates = token_candidates(p, batch, row);
    limit = kNoOrder;
    if (!has_threshold()) return;
    const float threshold = token_threshold(p, batch, list);
    if (threshold == threshold) limit = score_order(threshold);  // nothing passes NaN
  }

  __device__ bool has_threshold() const { return problem.rule == TokenRule::kThreshold; }

  // Entries beside the forced ones.
  __device__ uint32_t room() const {
    return static_cast<uint32_t>(problem.capacity - candidates.forced());
  }

  __device__ void write(uint32_t slot, uint32_t position) const {
    problem.indices[flat * problem.capacity + slot] = token_entry(problem, batch, position);
  }
};

// f(position, inside, order) for the words of 32 positions `first`, first + step, ... that begin
// below `end`: called by whole warps, a lane for each position. Nothing outside [begin, end) is read.
template <int kWordsInFlight, class F>
__device__ __forceinline__ void for_each_word(const float* scores, uint32_t begin, uint32_t end,
                                              uint32_t first, uint32_t step, F&& f) {
  const uint32_t lane = threadIdx.x % kWarpThreads;
  for (uint32_t word = first; word * kWarpThreads < end; word += kWordsInFlight * step) {
    float score[kWordsInFlight];
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      const uint32_t position = (word + i * step) * kWarpThreads + lane;
      const bool inside = position >= begin && position < end;
      score[i] = inside ? __ldg(scores + position) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      const uint32_t position = (word + i * step) * kWarpThreads + lane;
      f(position, position >= begin && position < end, score_order(score[i]));
    }
  }
}

}  // namespace attnsieve::sm80
