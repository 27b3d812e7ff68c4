// cpu::decode: attention of a few new query rows per sequence over a KV cache, all of it or what a
// TokenIndex lists.
//
// An item is the query heads that share a KV head and a list, with all new rows (one row where rows
// have lists of their own). Its query vectors are the columns of the transposed tiles of kernels.h,
// ordered by row, then head, so that a key is seen by a suffix of the columns. Keys are gathered 64
// at a time in list order, then the dense range ascending; one thread computes an item, so results
// depend on neither neighbours nor threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "attnsieve/capability.h"
#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"
#include "codes.h"
#include "kernels.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::align_val_t kAlignment{64};

struct Item {
  int64_t batch;
  int64_t head;  // the first of `heads` query heads
  int heads;
  int64_t row;  // the first of `rows` new rows
  int rows;
  int columns() const { return heads * rows; }
};

// How a problem is cut into items.
struct Items {
  explicit Items(const DecodeProblem& problem) {
    rows = problem.index.per_row() ? 1 : static_cast<int>(problem.seqlen_q);
    const int64_t group = problem.num_heads / problem.num_kv_heads;
    shared = problem.index.given() ? min64(group, problem.index.heads_per_list) : group;
    heads = static_cast<int>(min64(shared, kColumns / rows));
    per_shared = (shared + heads - 1) / heads;
    per_row = problem.num_heads / shared * per_shared;
    per_batch = per_row * (problem.seqlen_q / rows);
  }

  Item at(int64_t flat) const {
    const int64_t in_row = flat % per_batch % per_row;
    const int64_t first = in_row % per_shared * heads;
    return {flat / per_batch, in_row / per_shared * shared + first,
            static_cast<int>(min64(heads, shared - first)), flat % per_batch / per_row * rows,
            rows};
  }

  int rows;
  int64_t shared;  // heads with one KV head and one list
  int heads;  // of an item
  int64_t per_shared, per_row, per_batch;
};

// The buffers of one thread.
struct Scratch {
  explicit Scratch(int64_t head_dim) {
    const int64_t tile = head_dim * kColumns;
    const int64_t floats =
        3 * tile + 2 * kUnitKeys * head_dim + kUnitKeys * kColumns + 3 * kColumns;
    memory = ::operator new(floats * sizeof(float), kAlignment, std::nothrow);
    if (memory == nullptr) return;
    query = static_cast<float*>(memory);
    query_t = query + tile;
    out_t = query_t + tile;
    k = out_t + tile;
    v = k + kUnitKeys * head_dim;
    s = v + kUnitKeys * head_dim;
    row_max = s + kUnitKeys * kColumns;
    row_sum = row_max + kColumns;
    rescale = row_sum + kColumns;
  }
  ~Scratch() { ::operator delete(memory, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* memory = nullptr;
  float *query, *query_t, *out_t, *k, *v, *s, *row_max, *row_sum, *rescale;
};

class ItemRun {
 public:
  ItemRun(const DecodeProblem& problem, const Kernels& kernels, const Item& item, Scratch& scratch)
      : problem_(problem), kernels_(kernels), item_(item), scratch_(scratch) {
    head_dim_ = static_cast<int>(problem.head_dim);
    padded_ = (item.columns() + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
    length_ = problem.seqlen_k;
    if (problem.paged.seq_lens != nullptr)
      length_ = max64(0, min64(problem.paged.seq_lens[item.batch], length_));
    dense_begin_ = problem.index.given() ? length_ : 0;
    if (problem.dense_begin != nullptr)
      dense_begin_ = min64(dense_begin_, max64(0, problem.dense_begin[item.batch]));
    if (problem.recent > 0) dense_begin_ = min64(dense_begin_, max64(0, length_ - problem.recent));
    kv_head_ = item.head / (problem.num_heads / problem.num_kv_heads);
    logit_scale_ = problem.softmax_scale;
    if (problem.k_scale != nullptr) logit_scale_ *= problem.k_scale[kv_head_];
  }

  void run() {
    start();
    if (problem_.index.given()) walk_list();
    // No row of the item sees a key at or beyond this.
    const int64_t end = problem_.causal
                            ? min64(length_, length_ - problem_.seqlen_q + item_.row + item_.rows)
                            : length_;
    for (int64_t j = dense_begin_; j < end; ++j) visit(j);
    flush();
    finish();
  }

 private:
  void start() {
    const int64_t size = element_size(problem_.dtype);
    float* to = scratch_.query;
    for (int row = 0; row < item_.rows; ++row) {
      for (int head = 0; head < item_.heads; ++head, to += head_dim_) {
        const int64_t offset = item_.batch * problem_.q.stride_batch +
                               (item_.head + head) * problem_.q.stride_head +
                               (item_.row + row) * problem_.q.stride_row;
        kernels_.widen(static_cast<const char*>(problem_.q.data) + offset * size, problem_.dtype, 0,
                       1, head_dim_, to);
      }
    }
    kernels_.pack_query(scratch_.query, DType::kFloat32, head_dim_, item_.columns(), head_dim_,
                        padded_, scratch_.query_t);
    std::fill_n(scratch_.out_t, static_cast<int64_t>(head_dim_) * kColumns, 0.0f);
    std::fill_n(scratch_.row_max, kColumns, -kInfinity);
    std::fill_n(scratch_.row_sum, kColumns, 0.0f);
  }

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
        if (page < problem_.paged.num_pages) add(page, entry % problem_.paged.page_size, 0);
        continue;
      }
      const int64_t end = min64((entry + 1) * index.page_size, dense_begin_);
      for (int64_t j = entry * index.page_size; j < end; ++j) visit(j);
    }
  }

  // Key j of the sequence, 0 <= j < length.
  void visit(int64_t j) {
    int64_t first_column = 0;  // of those that see it
    if (problem_.causal) {
      const int64_t row = j - (length_ - problem_.seqlen_q);  // the first that sees it
      first_column = max64(0, row - item_.row) * item_.heads;
      if (first_column >= item_.columns()) return;
    }
    if (problem_.paged.block_table == nullptr) return add(item_.batch, j, first_column);
    const PagedKv& paged = problem_.paged;
    const int64_t page =
        paged.block_table[item_.batch * paged.table_stride_batch + j / paged.page_size];
    if (page >= 0 && page < paged.num_pages) add(page, j % paged.page_size, first_column);
  }

  void add(int64_t batch, int64_t row, int64_t first_column) {
    widen_row(problem_.k, batch, row, scratch_.k);
    widen_row(problem_.v, batch, row, scratch_.v);
    first_column_[keys_] = static_cast<int>(first_column);
    if (++keys_ == kUnitKeys) flush();
  }

  void widen_row(const HeadTensor& tensor, int64_t batch, int64_t row, float* to) {
    const int64_t offset =
        batch * tensor.stride_batch + kv_head_ * tensor.stride_head + row * tensor.stride_row;
    const int64_t size = element_size(problem_.dtype, problem_.code);
    widen_elements(kernels_, static_cast<const char*>(tensor.data) + offset * size, problem_.dtype,
                   problem_.code, head_dim_, to + static_cast<int64_t>(keys_) * head_dim_);
  }

  // One step of the online softmax over the gathered keys.
  void flush() {
    if (keys_ == 0) return;
    float* s = scratch_.s;
    kernels_.scores(scratch_.query_t, scratch_.k, head_dim_, keys_, head_dim_, logit_scale_,
                    padded_, s);
    bool masked = false;
    for (int i = 0; i < keys_; ++i) {
      masked = masked || first_column_[i] > 0;
      std::fill_n(s + i * kColumns, first_column_[i], -kInfinity);
    }
    kernels_.softmax(s, keys_, padded_, scratch_.row_max, scratch_.row_sum, scratch_.rescale);
    if (masked) {
      add_values_apart();
    } else {
      kernels_.accumulate(s, scratch_.v, head_dim_, keys_, head_dim_, scratch_.rescale, padded_,
                          scratch_.out_t);
    }
    keys_ = 0;
  }

  // A masked key has p = 0, but 0 * NaN is NaN: values that are not finite are zeros in the product,
  // and added to the columns that see their key. The others' bits do not depend on them.
  void add_values_apart() {
    const int64_t values = static_cast<int64_t>(keys_) * head_dim_;
    float* finite = scratch_.k;  // the keys are no longer needed
    std::transform(scratch_.v, scratch_.v + values, finite,
                   [](float x) { return std::isfinite(x) ? x : 0.0f; });
    kernels_.accumulate(scratch_.s, finite, head_dim_, keys_, head_dim_, scratch_.rescale, padded_,
                        scratch_.out_t);
    for (int64_t at = 0; at < values; ++at) {
      const float value = scratch_.v[at];
      if (std::isfinite(value)) continue;
      const int64_t key = at / head_dim_;
      const float* p = scratch_.s + key * kColumns;
      float* out = scratch_.out_t + at % head_dim_ * kColumns;
      for (int c = first_column_[key]; c < item_.columns(); ++c) out[c] += p[c] * value;
    }
  }

  // The sink, the division by the sum, the log-sum-exp, and the stores.
  void finish() {
    const int64_t size = element_size(problem_.dtype);
    for (int c = 0; c < item_.columns(); ++c) {
      const int64_t row = item_.row + c / item_.heads;
      const int64_t head = item_.head + c % item_.heads;
      const bool no_keys = scratch_.row_max[c] == -kInfinity;
      double max = scratch_.row_max[c];
      double sum = scratch_.row_sum[c];
      double scale = 1.0;
      if (problem_.sink != nullptr) {
        // Relative to the larger of the two, so that neither exponential overflows.
        const double sink = problem_.sink[head];
        const double top =
            max > sink ? max : (sink >= max ? sink : max + sink);  // the sum carries a NaN
        scale = max == top ? 1.0 : std::exp(max - top);
        sum = sum * scale + (sink == top ? (sink == -kInfinity ? 0.0 : 1.0) : std::exp(sink - top));
        max = top;
      }
      const bool empty = max == -kInfinity;
      if (problem_.lse.data != nullptr) {
        problem_.lse.data[item_.batch * problem_.lse.stride_batch +
                          head * problem_.lse.stride_head + row * problem_.lse.stride_row] =
            empty ? -kInfinity : static_cast<float>(max + std::log(sum));
      }
      const double v_scale = problem_.v_scale == nullptr ? 1.0 : problem_.v_scale[kv_head_];
      const float row_scale = static_cast<float>(scale / sum * v_scale);
      float* line = scratch_.query;  // the queries are no longer needed
      for (int d = 0; d < head_dim_; ++d)
        line[d] = no_keys ? 0.0f : scratch_.out_t[d * kColumns + c] * row_scale;
      const int64_t offset = item_.batch * problem_.out.stride_batch +
                             head * problem_.out.stride_head + row * problem_.out.stride_row;
      kernels_.narrow(line, problem_.dtype, head_dim_,
                      static_cast<char*>(problem_.out.data) + offset * size);
    }
  }

  const DecodeProblem& problem_;
  const Kernels& kernels_;
  const Item& item_;
  Scratch& scratch_;
  int head_dim_;
  int padded_;
  int64_t length_;
  int64_t dense_begin_;  // keys from here on are attended whatever the list says
  int64_t kv_head_;
  float logit_scale_;  // of q . k, where k may be codes
  int keys_ = 0;  // gathered
  int first_column_[kUnitKeys];
};

void check(const DecodeProblem& problem) {
  require_supported("decode", Backend::kCpu, problem.dtype, problem.head_dim);
  if (problem.num_kv_heads <= 0 || problem.num_heads % problem.num_kv_heads != 0)
    throw InvalidArgument("decode: the query heads must be a multiple of the KV heads");
  if (problem.seqlen_q < 0 || problem.seqlen_q > kMaxDecodeRows)
    throw InvalidArgument("decode: at most " + std::to_string(kMaxDecodeRows) + " new rows, got " +
                          std::to_string(problem.seqlen_q));
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
  const Items items(problem);
  const Kernels& widest = kernels();
  std::atomic<bool> out_of_memory{false};
  parallel_for(problem.batch * items.per_batch, [&](int64_t begin, int64_t end) {
    Scratch scratch(problem.head_dim);  // the only allocation
    if (scratch.memory == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t flat = begin; flat < end; ++flat) {
      const Item item = items.at(flat);
      ItemRun(problem, widest, item, scratch).run();
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace attnsieve::cpu
