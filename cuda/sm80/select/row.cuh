// A row of select_blocks: what it sees, what is forced, how many blocks it keeps; and the end of a
// list.
#pragma once

#include "attnsieve/problem.h"
#include "attnsieve/visibility.h"
#include "cuda/common/numeric.cuh"

namespace attnsieve::sm80 {

__device__ __forceinline__ int64_t num_q_blocks(const SelectProblem& p) {
  return (p.seqlen_q + p.block_q - 1) / p.block_q;
}

class SelectRow {
 public:
  __device__ SelectRow(const SelectProblem& p, int64_t row_of_all)
      : counts_(p.counts + row_of_all),
        columns_(p.columns + row_of_all * p.capacity),
        capacity_(p.capacity),
        sink_(p.sink_blocks) {
    const int64_t num_q_blocks = sm80::num_q_blocks(p);
    const int64_t row = row_of_all % num_q_blocks;
    const int64_t head = row_of_all / num_q_blocks % p.num_heads;
    const int64_t batch = row_of_all / num_q_blocks / p.num_heads;
    scores_ = p.scores + batch * p.scores_stride_batch + head * p.scores_stride_head +
              row * p.scores_stride_row;
    const KeyRange keys = visible_keys(
        p.mask, row * p.block_q, min64((row + 1) * p.block_q, p.seqlen_q), p.seqlen_q, p.seqlen_k);
    if (keys.begin < keys.end) {
      begin_ = static_cast<int>(keys.begin / p.block_k);
      end_ = static_cast<int>((keys.end + p.block_k - 1) / p.block_k);
    }
    const KeyRange diagonal = diagonal_blocks(row, p.block_q, p.block_k, p.seqlen_q, p.seqlen_k);
    if (diagonal.begin < diagonal.end) {
      local_begin_ = static_cast<int>(max64(0, diagonal.begin - p.local_blocks));
      local_end_ = static_cast<int>(p.force_diagonal ? diagonal.end : diagonal.begin);
    }
  }

  // Visible columns.
  __device__ int begin() const { return begin_; }
  __device__ int end() const { return end_; }
  __device__ float score(int column) const { return scores_[column]; }
  __device__ bool is_forced(int column) const {
    return column < sink_ || (column >= local_begin_ && column < local_end_);
  }

  // Blocks to keep, of which `forced` are forced; the fewest of them for a rule of masses.
  __device__ int budget(const SelectProblem& p, int forced) const {
    const int visible = end_ - begin_;
    int blocks = p.topk;
    if (p.rule == SelectRule::kFraction) {
      blocks = max(p.min_blocks, static_cast<int>(ceil(p.fraction * static_cast<double>(visible))));
    } else if (p.rule == SelectRule::kTopP) {
      blocks = p.min_blocks;
    }
    return max(min(blocks, visible), forced);
  }

  __device__ void put(int position, int column) const {
    if (position < capacity_) columns_[position] = column;
  }

  // Behind `written` blocks, by `threads` threads.
  __device__ void finish(int written, int thread, int threads) const;

 private:
  const float* scores_;
  int32_t* counts_;
  int32_t* columns_;
  int capacity_;
  int sink_;
  int begin_ = 0;
  int end_ = 0;
  int local_begin_ = 0;
  int local_end_ = 0;
};

// -1 from `begin` to `end` of a list, by `threads` threads, 16 bytes at a time.
__device__ __forceinline__ void fill_list(int32_t* columns, int begin, int end, int thread,
                                          int threads) {
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(columns) / sizeof(int32_t) % 4);
  const int wide_begin = min((begin + skew + 3) / 4 * 4 - skew, end);
  const int wide_end = max((end + skew) / 4 * 4 - skew, wide_begin);
  if (begin + thread < wide_begin) columns[begin + thread] = -1;
  for (int i = wide_begin + thread * 4; i < wide_end; i += threads * 4)
    *reinterpret_cast<int4*>(columns + i) = {-1, -1, -1, -1};
  if (wide_end + thread < end) columns[wide_end + thread] = -1;
}

__device__ inline void SelectRow::finish(int written, int thread, int threads) const {
  fill_list(columns_, written, capacity_, thread, threads);
  if (thread == 0) *counts_ = min(written, capacity_);
}

}  // namespace attnsieve::sm80
