// Where the ranked candidates of a list lie in memory.
#pragma once

#include "cuda/sm80/select_tokens/list.cuh"

namespace attnsieve::sm80 {

inline constexpr uint32_t kVectorScores = 4;  // of a load
inline constexpr uint32_t kWordVectors = kWarpThreads / kVectorScores;

// Candidates that fill a vector, aligned in memory, and up to three before and behind them. Vectors,
// and words of marks, are counted from the last vector boundary before the list.
struct CandidateSpan {
  const float* scores;
  uint32_t begin;
  uint32_t end;
  uint32_t lead;  // scores of vector 0 before the list

  CandidateSpan() = default;
  __device__ explicit CandidateSpan(const ScoreList& list)
      : scores(list.scores),
        begin(static_cast<uint32_t>(list.candidates.begin)),
        end(static_cast<uint32_t>(list.candidates.end)),
        lead(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(scores) / sizeof(float) %
                                   kVectorScores)) {}

  __device__ uint32_t size() const { return end - begin; }
  __device__ uint32_t first_vector() const {
    return (begin + lead + kVectorScores - 1) / kVectorScores;
  }
  __device__ uint32_t num_vectors() const {
    return max((end + lead) / kVectorScores, first_vector()) - first_vector();
  }
  __device__ uint32_t first_word() const { return (begin + lead) / kWarpThreads; }
  __device__ uint32_t num_words() const { return (end + lead) / kWarpThreads - first_word() + 1; }

  // Of a vector of the list.
  __device__ float4 load(uint32_t vector) const {
    return __ldg(reinterpret_cast<const float4*>(scores - lead) + vector);
  }
};

}  // namespace attnsieve::sm80
