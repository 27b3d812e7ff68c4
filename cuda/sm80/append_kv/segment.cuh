// The new rows of one sequence, the part of them that a CTA writes, and where they go.
#pragma once

#include "attnsieve/visibility.h"
#include "cuda/common/numeric.cuh"
#include "cuda/sm80/append_kv/arguments.h"

namespace attnsieve::sm80 {

class Segment {
 public:
  // `slot`: segments are numbered as in AppendKvPlan. One that no row falls into is empty. Divisions
  // are of 32 bits: lengths are.
  __device__ Segment(const AppendKvArguments& a, int slot) : problem_(a.problem) {
    const int keys = a.plan.segment_keys;
    int source = 0;
    int64_t count = problem_.seqlen_q;
    if (problem_.cu_seqlens == nullptr) {
      batch_ = slot / a.plan.segments;
      slot -= batch_ * a.plan.segments;
    } else {
      batch_ = sequence_of(slot, keys);
      slot -= first_slot(batch_, keys);
      source = offset(batch_);
      count = max(0, offset(batch_ + 1) - source);
    }
    const int64_t length = problem_.pages.seq_lens[batch_];
    const int64_t first = max64(0, length - count);
    const int64_t last = min64(length, problem_.seqlen_k);  // one past
    source_of_zero_ = source - (length - count);
    page_begin_ = (static_cast<int64_t>(static_cast<int>(first) / keys) + slot) * keys;
    begin_ = max64(first, page_begin_);
    end_ = min64(last, page_begin_ + keys);
  }

  __device__ bool empty() const { return begin_ >= end_; }
  __device__ int batch() const { return batch_; }
  // Of the first page, which begins no later than the first new row.
  __device__ int64_t page_begin() const { return page_begin_; }
  // New rows are the positions [begin, end).
  __device__ int64_t begin() const { return begin_; }
  __device__ int64_t end() const { return end_; }

  // The row of k and v that goes to position j; packed rows are counted over the batch.
  __device__ int64_t source_row(int64_t j) const { return source_of_zero_ + j; }

  // The sequence or page that holds position j; negative where there is none.
  __device__ int64_t place_of(int64_t j) const {
    const PagedKv& pages = problem_.pages;
    if (pages.block_table == nullptr) return batch_;
    const int slot = static_cast<int>(j) / pages.page_size;
    const int64_t page = pages.block_table[batch_ * pages.table_stride_batch + slot];
    return page < pages.num_pages ? page : -1;
  }

  __device__ int64_t row_of(int64_t j) const {
    if (problem_.pages.block_table == nullptr) return j;
    return static_cast<int>(j) % problem_.pages.page_size;
  }

 private:
  // Offsets that do not ascend or leave the rows are bent into range: no access leaves the tensors.
  __device__ int offset(int sequence) const {
    return static_cast<int>(max64(0, min64(problem_.cu_seqlens[sequence], problem_.seqlen_q)));
  }

  __device__ int first_slot(int sequence, int keys) const {
    return offset(sequence) / keys + 2 * sequence;
  }

  // The last sequence whose segments begin no later than `slot`.
  __device__ int sequence_of(int slot, int keys) const {
    int low = 0;
    int high = static_cast<int>(problem_.batch) - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_slot(middle, keys) <= slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  const AppendKvProblem& problem_;
  int batch_;
  int64_t source_of_zero_;
  int64_t page_begin_;
  int64_t begin_, end_;
};

}  // namespace attnsieve::sm80
