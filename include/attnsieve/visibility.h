// Which keys a range of query rows may see: the one definition of causal, window and block
// visibility that every backend, the selector and the tests' C++ side share. Plain integer
// arithmetic, usable in device code.
#pragma once

#include "attnsieve/problem.h"

#ifdef __CUDACC__
#define ATTNSIEVE_HD __host__ __device__ __forceinline__
#else
#define ATTNSIEVE_HD inline
#endif

namespace attnsieve {

struct KeyRange {
  int64_t begin;  // first visible key
  int64_t end;    // one past the last visible key; begin >= end means none
};

ATTNSIEVE_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
ATTNSIEVE_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

struct Seqlens {
  int64_t q;
  int64_t k;
};

// Of sequence `b`; of a packed one at most what there is room for.
ATTNSIEVE_HD Seqlens seqlens_of(const SelectProblem& p, int64_t b) {
  const auto length = [b](const int32_t* cu_seqlens, int64_t most) {
    return min64(max64(int64_t{cu_seqlens[b + 1]} - cu_seqlens[b], 0), most);
  };
  if (p.varlen.cu_seqlens_q == nullptr) return {p.seqlen_q, p.seqlen_k};
  return {length(p.varlen.cu_seqlens_q, p.seqlen_q), length(p.varlen.cu_seqlens_k, p.seqlen_k)};
}

// Keys visible to at least one of the query rows [row_begin, row_end) of a sequence.
ATTNSIEVE_HD KeyRange visible_keys(const Mask& mask, int64_t row_begin, int64_t row_end,
                                   int64_t seqlen_q, int64_t seqlen_k) {
  const int64_t offset = seqlen_k - seqlen_q;
  int64_t begin = 0;
  int64_t end = seqlen_k;
  if (mask.window_left >= 0) begin = max64(begin, row_begin + offset - mask.window_left);
  int64_t right = kUnbounded;
  if (mask.causal) right = 0;
  if (mask.window_right >= 0) right = mask.causal ? 0 : mask.window_right;
  if (right >= 0) end = min64(end, row_end + offset + right);
  if (row_begin >= row_end) end = begin;
  return {begin, end};
}

// KV blocks of the row's own positions: the "diagonal" of q-block row `row`. Empty where the
// diagonal lies outside.
ATTNSIEVE_HD KeyRange diagonal_blocks(int64_t row, int64_t block_q, int64_t block_k,
                                      int64_t seqlen_q, int64_t seqlen_k) {
  const int64_t offset = seqlen_k - seqlen_q;
  const int64_t first = max64(0, row * block_q + offset);
  const int64_t last = min64(min64((row + 1) * block_q, seqlen_q) - 1 + offset, seqlen_k - 1);
  if (last < first) return {0, 0};
  return {first / block_k, last / block_k + 1};
}

}  // namespace attnsieve
