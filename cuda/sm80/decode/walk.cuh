// The keys that an item visits, slot by slot: the entries of its list, then the dense range. Slots
// whose entry is bad, whose page is missing or that belong to the dense range stay empty.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/sm80/decode/arguments.h"

namespace attnsieve::sm80 {

// Query vectors that share their keys: column c is new row `row` + c / heads of query head
// `head` + c % heads.
struct DecodeItem {
  int batch;
  int head;
  int heads;
  int row;
  int kv_head;
  int columns;
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
  found.columns = found.heads * plan.rows;
  return found;
}

// Where a key lies in K and V, and its position in the sequence.
struct KeyPlace {
  static constexpr int kNowhere = 0x7fffffff;  // position of a slot without key
  static constexpr int kAnywhere = -0x7fffffff;  // of a key that every column sees
  int outer;  // batch or page
  int row;
  int position;
};

// K or V of one KV head; strides in elements.
struct KeySource {
  const void* data;
  int64_t stride_outer;
  int64_t stride_row;
};

// An item and what it visits. One copy a CTA, in shared memory.
struct DecodeTask {
  DecodeItem item;
  KeySource k;
  KeySource v;
  int length;  // keys of the sequence
  int dense_begin;  // keys from here on are attended whatever the list says
  int list_slots;
  int slots;
  const int32_t* entries;
  const int32_t* table;  // the sequence's row of the page table

  __device__ int chunks(const cuda::DecodePlan& plan) const {
    // At least one: an item without keys has a result as well.
    return max(1, (slots + plan.chunk_keys - 1) / plan.chunk_keys);
  }
  // First slot of a chunk, or the end of the last. Chunks differ by a unit at most, wherever in the
  // walk: any run of them is as long as another.
  __device__ int chunk_begin(const cuda::DecodePlan& plan, int chunk) const {
    const int units = (slots + plan.chunk_unit - 1) / plan.chunk_unit;
    const auto before = static_cast<uint64_t>(units) * static_cast<unsigned>(chunk);
    return min(slots,
               static_cast<int>(before / static_cast<unsigned>(chunks(plan))) * plan.chunk_unit);
  }
};

template <class Stored>
__device__ __forceinline__ KeySource source_of(const HeadTensor& tensor, int kv_head) {
  return {static_cast<const Stored*>(tensor.data) + kv_head * tensor.stride_head,
          tensor.stride_batch, tensor.stride_row};
}

template <class Stored>
__device__ __forceinline__ DecodeTask make_task(const DecodeArguments& a, int item_index) {
  const DecodeProblem& p = a.problem;
  DecodeTask task;
  task.item = locate_item(a, item_index);
  const DecodeItem& item = task.item;
  task.k = source_of<Stored>(p.k, item.kv_head);
  task.v = source_of<Stored>(p.v, item.kv_head);
  const int capacity = static_cast<int>(p.seqlen_k);
  task.length = capacity;
  if (p.paged.seq_lens != nullptr)
    task.length = max(0, min(p.paged.seq_lens[item.batch], capacity));
  task.dense_begin = p.index.given() ? task.length : 0;
  if (p.dense_begin != nullptr) {
    task.dense_begin = min(task.dense_begin, max(0, p.dense_begin[item.batch]));
  }
  if (p.recent > 0) {
    task.dense_begin =
        min(task.dense_begin, static_cast<int>(max(int64_t{0}, task.length - p.recent)));
  }
  task.list_slots = 0;
  task.entries = nullptr;
  if (p.index.given()) {
    const TokenIndexView& index = p.index;
    const int list = item.head / index.heads_per_list;
    int count = index.capacity;
    if (index.counts != nullptr) {
      count =
          min(count,
              index.counts[item.batch * index.counts_stride_batch +
                           item.row * index.counts_stride_row + list * index.counts_stride_head]);
    }
    task.list_slots = max(count, 0) * static_cast<int>(index.page_size);
    task.entries = index.indices + item.batch * index.indices_stride_batch +
                   item.row * index.indices_stride_row + list * index.indices_stride_head;
  }
  task.slots = task.list_slots + task.length - task.dense_begin;
  task.table = p.paged.block_table;
  if (task.table != nullptr) task.table += item.batch * p.paged.table_stride_batch;
  return task;
}

// Of a key of the item, whose pages are in `table`, if there is one.
__device__ __forceinline__ KeyPlace place_of_key(const DecodeArguments& a, const DecodeTask& task,
                                                 const int* table, int position) {
  if (table == nullptr) return {task.item.batch, position, position};
  int entry = 0;
  int row = 0;
  a.cache_page(entry, row, position);
  const int page = table[entry];
  if (page < 0 || page >= a.problem.paged.num_pages) return {0, 0, KeyPlace::kNowhere};
  return {page, row, position};
}

__device__ __forceinline__ KeyPlace place_of(const DecodeArguments& a, const DecodeTask& task,
                                             int slot) {
  const PagedKv& paged = a.problem.paged;
  constexpr KeyPlace kNone{0, 0, KeyPlace::kNowhere};
  int position = task.dense_begin + slot - task.list_slots;
  if (slot < task.list_slots) {
    int in_list = slot;
    int in_entry = 0;
    a.index_page(in_list, in_entry, slot);
    const int entry = task.entries[in_list];
    if (entry < 0) return kNone;
    if (a.problem.index.physical) {
      int page = 0;
      int row = 0;
      a.cache_page(page, row, entry);
      return page < paged.num_pages ? KeyPlace{page, row, KeyPlace::kAnywhere} : kNone;
    }
    const int64_t key = static_cast<int64_t>(entry) * a.index_page.divisor + in_entry;
    if (key >= task.dense_begin) return kNone;
    position = static_cast<int>(key);
  }
  return place_of_key(a, task, task.table, position);
}

}  // namespace attnsieve::sm80
