// cpu::decode: attention of a few new query rows per sequence over a KV cache, all of it or what a
// TokenIndex lists. Keys are gathered 64 at a time in list order, then the dense range ascending.
#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"
#include "decode_item.h"

namespace attnsieve::cpu {
namespace {

class ListRun : ItemRun {
 public:
  ListRun(const DecodeProblem& problem, const Kernels& kernels, const Item& item,
          ItemScratch& scratch)
      : ItemRun(problem, kernels, item, scratch) {
    dense_begin_ = problem.index.given() ? length_ : 0;
    if (problem.dense_begin != nullptr)
      dense_begin_ = min64(dense_begin_, max64(0, problem.dense_begin[item.batch]));
    if (problem.recent > 0) dense_begin_ = min64(dense_begin_, max64(0, length_ - problem.recent));
  }

  void run() {
    start();
    if (problem_.index.given()) walk_list();
    for (int64_t j = dense_begin_; j < keys_end(); ++j) visit(j);
    flush();
    finish();
  }

 private:
  void walk_list() {
    const TokenIndexView& index = problem_.index;
    const int64_t list = item_.head / index.heads_per_list;
    int64_t count = index.capacity;
    if (index.counts != nullptr) {
      const int32_t own =
          index.counts[item_.batch * index.counts_stride_batch +
                       item_.row * index.counts_stride_row + list * index.counts_stride_head];
      count = max64(0, min64(own, count));
    }
    const int32_t* entries = index.indices + item_.batch * index.indices_stride_batch +
                             item_.row * index.indices_stride_row +
                             list * index.indices_stride_head;
    for (int64_t slot = 0; slot < count; ++slot) {
      const int64_t entry = entries[slot];
      if (entry < 0) continue;
      if (index.physical) {
        const int64_t page = entry / problem_.paged.page_size;
        if (page >= problem_.paged.num_pages) continue;
        step_.keys[step_.count++] = {page, entry % problem_.paged.page_size, 0};
        flush_if_full();
        continue;
      }
      const int64_t end = min64((entry + 1) * index.page_size, dense_begin_);
      for (int64_t j = entry * index.page_size; j < end; ++j) visit(j);
    }
  }

  // Key j of the sequence, 0 <= j < length.
  void visit(int64_t j) {
    gather(j, &step_);
    flush_if_full();
  }

  void flush_if_full() {
    if (step_.count == kUnitKeys) flush();
  }

  void flush() {
    if (step_.count == 0) return;
    logits(step_, scratch_.s);
    attend(step_, scratch_.s);
    step_.count = 0;
  }

  int64_t dense_begin_;  // keys from here on are attended whatever the list says
  ItemStep step_;
};

void check(const DecodeProblem& problem) {
  check_decode("decode", problem);
  const TokenIndexView& index = problem.index;
  if (!index.given()) return;
  if (index.page_size <= 0) throw InvalidArgument("decode: index.page_size must be positive");
  const int64_t group = problem.num_heads / problem.num_kv_heads;
  if (index.heads_per_list % group != 0 && group % index.heads_per_list != 0)
    throw InvalidArgument("decode: lists must not cut across the heads of a KV group");
  if (index.per_row() && index.num_rows != problem.seqlen_q)
    throw InvalidArgument("decode: lists of each row's own need one for every row");
  if (index.physical && (problem.paged.block_table == nullptr || index.page_size != 1))
    throw InvalidArgument("decode: physical entries are slots of single tokens in a paged cache");
}

}  // namespace

void decode(const DecodeProblem& problem, const ParallelFor& parallel_for) {
  check(problem);
  if (problem.batch == 0 || problem.num_heads == 0 || problem.seqlen_q == 0) return;
  for_each_item(problem, Items(problem, kColumns), kUnitKeys, parallel_for,
                [&](const Item& item, const Kernels& kernels, ItemScratch& scratch) {
                  ListRun(problem, kernels, item, scratch).run();
                });
}

}  // namespace attnsieve::cpu
