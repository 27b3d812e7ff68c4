// The keys that an item visits, slot by slot: the entries of its list, then the dense range. Slots
// whose entry is bad, whose page is missing or that belong to the dense range stay empty.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/sm80/decode/arguments.h"

namespace attnsieve::sm80 {

struct DecodeItem {
  int batch;
  int head;  // the first of `heads`
  int heads;
  int row;  // the first of plan.rows
  int kv_head;
};

__device__ __forceinline__ DecodeItem locate_item(const DecodeArguments& a, int item) {
  const cuda::DecodePlan& plan = a.plan;
  DecodeItem found;
  found.batch = item / plan.items_per_batch;
  const int in_batch = item % plan.items_per_batch;
  found.row = in_batch / plan.items_per_row * plan.rows;
  const int in_row = in_batch % plan.items_per_row;
  const int first = in_row % plan.items_per_group * plan.heads;
  found.head = in_row / plan.items_per_group * plan.shared_heads + first;
  found.heads = min(plan.heads, plan.shared_heads - first);
  found.kv_head = found.head / plan.group_size;
  return found;
}

// Where a key lies in K and V, and its position in the sequence.
struct KeyPlace {
  static constexpr int kNowhere = 0x7fffffff;  // position of a slot without key
  int outer;  // batch or page
  int row;
  int position;
};

class DecodeWalk {
 public:
  __device__ DecodeWalk(const DecodeArguments& a, const DecodeItem& item)
      : problem_(a.problem), batch_(item.batch) {
    const DecodeProblem& p = a.problem;
    length_ = p.seqlen_k;
    if (p.paged.seq_lens != nullptr) {
      length_ = max(int64_t{0}, min(static_cast<int64_t>(p.paged.seq_lens[batch_]), length_));
    }
    dense_begin_ = p.index.given() ? length_ : 0;
    if (p.dense_begin != nullptr) {
      const auto begin = static_cast<int64_t>(p.dense_begin[batch_]);
      dense_begin_ = min(dense_begin_, max(int64_t{0}, begin));
    }
    if (p.recent > 0) dense_begin_ = min(dense_begin_, max(int64_t{0}, length_ - p.recent));
    list_slots_ = 0;
    if (!p.index.given()) return;
    const TokenIndexView& index = p.index;
    const int list = item.head / index.heads_per_list;
    int count = index.capacity;
    if (index.counts != nullptr) {
      count = min(count, index.counts[batch_ * index.counts_stride_batch +
                                      item.row * index.counts_stride_row +
                                      list * index.counts_stride_head]);
    }
    list_slots_ = max(count, 0) * index.page_size;
    entries_ = index.indices + batch_ * index.indices_stride_batch +
               item.row * index.indices_stride_row + list * index.indices_stride_head;
  }

  __device__ int64_t length() const { return length_; }
  __device__ int64_t slots() const { return list_slots_ + length_ - dense_begin_; }

  __device__ KeyPlace at(int64_t slot) const {
    const PagedKv& paged = problem_.paged;
    constexpr KeyPlace kNone{0, 0, KeyPlace::kNowhere};
    int64_t position = dense_begin_ + slot - list_slots_;
    if (slot < list_slots_) {
      const int64_t unit = problem_.index.page_size;
      const int64_t entry = entries_[unit == 1 ? slot : slot / unit];
      if (entry < 0) return kNone;
      if (problem_.index.physical) {
        const int64_t page = entry / paged.page_size;
        if (page >= paged.num_pages) return kNone;
        return {static_cast<int>(page), static_cast<int>(entry % paged.page_size), 0};
      }
      position = unit == 1 ? entry : entry * unit + slot % unit;
      if (position >= dense_begin_) return kNone;
    }
    if (paged.block_table == nullptr) {
      return {batch_, static_cast<int>(position), static_cast<int>(position)};
    }
    const int page =
        paged.block_table[batch_ * paged.table_stride_batch + position / paged.page_size];
    if (page < 0 || page >= paged.num_pages) return kNone;
    return {page, static_cast<int>(position % paged.page_size), static_cast<int>(position)};
  }

 private:
  const DecodeProblem& problem_;
  const int32_t* entries_ = nullptr;
  int64_t length_;
  int64_t dense_begin_;  // keys from here on are attended whatever the list says
  int64_t list_slots_;
  int batch_;
};

// Chunks of an item. At least one: an item without keys has a result as well.
__device__ __forceinline__ int chunks_of(const DecodeArguments& a, const DecodeWalk& walk) {
  const int64_t chunks = (walk.slots() + a.plan.chunk_keys - 1) / a.plan.chunk_keys;
  return static_cast<int>(min(max(chunks, int64_t{1}), int64_t{a.plan.max_chunks}));
}

}  // namespace attnsieve::sm80
