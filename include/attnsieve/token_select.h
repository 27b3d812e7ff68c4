// What a list of select_tokens ranges over, how its entries are written, and what makes a problem
// malformed: shared by the backends.
#pragma once

#include <string>

#include "attnsieve/problem.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"

namespace attnsieve {

// Candidates [0, count) of a list; those outside [begin, end) are kept whatever their scores.
struct TokenCandidates {
  int32_t begin;
  int32_t end;
  int32_t count;

  ATTNSIEVE_HD int32_t ranked() const { return end - begin; }
  ATTNSIEVE_HD int32_t forced() const { return count - ranked(); }
};

ATTNSIEVE_HD TokenCandidates token_candidates(const TokenSelectProblem& problem, int64_t batch,
                                              int64_t row) {
  int64_t count = problem.columns;
  if (problem.pages.seq_lens != nullptr) {
    int64_t keys = problem.pages.seq_lens[batch];
    if (problem.causal) keys -= problem.seqlen_q - 1 - row;
    // 32 bits, where a GPU divides several times faster: keys and hence pages fit.
    const uint32_t page_size = static_cast<uint32_t>(min64(problem.page_size, INT32_MAX));
    const uint32_t pages = keys <= 0 ? 0 : (static_cast<uint32_t>(keys) - 1) / page_size + 1;
    count = min64(pages, count);
  }
  const int64_t begin = min64(problem.sink, count);
  const int64_t end = max64(begin, count - problem.recent);
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end), static_cast<int32_t>(count)};
}

// What a list of sequence `batch` says for the candidate at `position`.
ATTNSIEVE_HD int32_t token_entry(const TokenSelectProblem& problem, int64_t batch,
                                 uint32_t position) {
  const PagedKv& pages = problem.pages;
  if (pages.block_table == nullptr) return static_cast<int32_t>(position);
  const bool whole_pages = problem.page_size > 1;
  const uint32_t page_size = static_cast<uint32_t>(pages.page_size);
  const uint32_t slot = whole_pages ? position : position / page_size;
  if (slot >= static_cast<uint32_t>(pages.max_pages)) return -1;
  const int64_t page = pages.block_table[batch * pages.table_stride_batch + slot];
  if (page < 0 || page >= pages.num_pages) return -1;
  if (whole_pages) return static_cast<int32_t>(page);
  return static_cast<int32_t>(page * page_size + position % page_size);
}

ATTNSIEVE_HD float token_threshold(const TokenSelectProblem& problem, int64_t batch, int64_t list) {
  const Threshold& threshold = problem.threshold;
  if (threshold.per_head == nullptr) return threshold.value;
  return threshold.per_head[batch * threshold.stride_batch + list * threshold.stride_head];
}

inline void check_token_select(const TokenSelectProblem& problem) {
  if (problem.batch < 0 || problem.seqlen_q < 0 || problem.num_lists < 0 || problem.columns < 0 ||
      problem.columns > INT32_MAX || problem.capacity < 0) {
    throw InvalidArgument("select_tokens: sizes must not be negative, nor columns above 2^31 - 1");
  }
  if (problem.page_size <= 0) {
    throw InvalidArgument("select_tokens: page_size must be positive, got " +
                          std::to_string(problem.page_size));
  }
  if (problem.sink < 0 || problem.recent < 0 || problem.sink > problem.capacity ||
      problem.recent > problem.capacity - problem.sink) {
    throw InvalidArgument(
        "select_tokens: " + std::to_string(problem.sink) + " + " + std::to_string(problem.recent) +
        " forced entries do not fit in a budget of " + std::to_string(problem.capacity));
  }
  const PagedKv& pages = problem.pages;
  if (pages.block_table != nullptr && problem.page_size != 1 &&
      problem.page_size != pages.page_size) {
    throw InvalidArgument("select_tokens: page_size must be 1 or that of the block table");
  }
}

}  // namespace attnsieve
