// What cpu::decode and cpu::threshold_decode share: how a problem is cut into items, and one item from
// queries to stored rows.
//
// An item is query heads that share a KV head (and a list), with all new rows (one row where rows
// have lists of their own). Its query vectors are the columns of the transposed tiles of kernels.h,
// ordered by row, then head, so that a key is seen by a suffix of the columns. One thread computes
// an item, so results depend on neither neighbours nor threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "attnsieve/launch.h"
#include "attnsieve/problem.h"
#include "kernels.h"

namespace attnsieve::cpu {

struct Item {
  int64_t batch;
  int64_t head;  // the first of `heads` query heads
  int heads;
  int64_t row;  // the first of `rows` new rows
  int rows;
  int columns() const { return heads * rows; }
};

// How a problem is cut into items of at most `columns` query vectors.
struct Items {
  Items(const DecodeProblem& problem, int columns);
  Item at(int64_t flat) const;

  int rows;
  int64_t shared;  // heads with one KV head and one list
  int heads;  // of an item
  int64_t per_shared, per_row, per_batch;
};

// The buffers of one thread, in one allocation.
struct ItemScratch {
  // memory stays nullptr where there is none: the caller is inside a parallel body.
  ItemScratch(int64_t head_dim, int tile_keys);
  ~ItemScratch();
  ItemScratch(const ItemScratch&) = delete;
  ItemScratch& operator=(const ItemScratch&) = delete;

  void* memory = nullptr;
  float *query, *query_t, *out_t;  // [kColumns][head_dim], and transposed
  float *k, *v;  // [kUnitKeys][head_dim]: the rows of a step
  float* s;  // [tile_keys][kColumns]: logits, then probabilities
  float *row_max, *row_sum, *rescale, *tile_max, *split_max;  // [kColumns]
};

// Where a key lies, and the first column that sees it.
struct ItemKey {
  int64_t batch;  // or page
  int64_t row;
  int first_column;
};

// What one round of the online softmax takes in.
struct ItemStep {
  int count = 0;
  ItemKey keys[kUnitKeys];
};

class ItemRun {
 protected:
  ItemRun(const DecodeProblem& problem, const Kernels& kernels, const Item& item,
          ItemScratch& scratch);

  // Packs the queries, clears the accumulators.
  void start();
  // No row of the item sees a key at or beyond this.
  int64_t keys_end() const;
  // Adds key j of the sequence, 0 <= j < length, where some column sees it and its page exists.
  void gather(int64_t j, ItemStep* step) const;
  // Scaled and masked logits of a step.
  void logits(const ItemStep& step, float* s) const;
  // Adds a step to the accumulators; s from logits on entry, probabilities on return.
  void attend(const ItemStep& step, float* s);
  // The sink, the division by the sum, the log-sum-exp, and the stores.
  void finish();

  const DecodeProblem& problem_;
  const Kernels& kernels_;
  const Item& item_;
  ItemScratch& scratch_;
  int head_dim_;
  int padded_;
  int64_t length_;
  int64_t kv_head_;
  float logit_scale_;  // of q . k, where k may be codes

 private:
  void widen_rows(const HeadTensor& tensor, const ItemStep& step, float* to) const;
  void add_values_apart(const ItemStep& step, const float* p);
};

// What every problem has to satisfy; `op` names it in the text.
void check_decode(const char* op, const DecodeProblem& problem);

// run(item, kernels, scratch) for every item, on any number of threads.
template <class Run>
void for_each_item(const DecodeProblem& problem, const Items& items, int tile_keys,
                   const ParallelFor& parallel_for, Run run) {
  const Kernels& widest = kernels();
  std::atomic<bool> out_of_memory{false};
  parallel_for(problem.batch * items.per_batch, [&](int64_t begin, int64_t end) {
    ItemScratch scratch(problem.head_dim, tile_keys);  // the only allocation
    if (scratch.memory == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t flat = begin; flat < end; ++flat) run(items.at(flat), widest, scratch);
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace attnsieve::cpu
