#include "decode_item.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "attnsieve/capability.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"
#include "codes.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::align_val_t kAlignment{64};

}  // namespace

Items::Items(const DecodeProblem& problem, int columns) {
  rows = problem.index.per_row() ? 1 : static_cast<int>(problem.seqlen_q);
  const int64_t group = problem.num_heads / problem.num_kv_heads;
  shared = problem.index.given() ? min64(group, problem.index.heads_per_list) : group;
  heads = static_cast<int>(min64(shared, columns / rows));
  per_shared = (shared + heads - 1) / heads;
  per_row = problem.num_heads / shared * per_shared;
  per_batch = per_row * (problem.seqlen_q / rows);
}

Item Items::at(int64_t flat) const {
  const int64_t in_row = flat % per_batch % per_row;
  const int64_t first = in_row % per_shared * heads;
  return {flat / per_batch, in_row / per_shared * shared + first,
          static_cast<int>(min64(heads, shared - first)), flat % per_batch / per_row * rows, rows};
}

ItemScratch::ItemScratch(int64_t head_dim, int tile_keys) {
  const int64_t tile = head_dim * kColumns;
  const int64_t floats = 3 * tile + 2 * kUnitKeys * head_dim + tile_keys * kColumns + 5 * kColumns;
  memory = ::operator new(floats * sizeof(float), kAlignment, std::nothrow);
  if (memory == nullptr) return;
  query = static_cast<float*>(memory);
  query_t = query + tile;
  out_t = query_t + tile;
  k = out_t + tile;
  v = k + kUnitKeys * head_dim;
  s = v + kUnitKeys * head_dim;
  row_max = s + tile_keys * kColumns;
  row_sum = row_max + kColumns;
  rescale = row_sum + kColumns;
  tile_max = rescale + kColumns;
  split_max = tile_max + kColumns;
}

ItemScratch::~ItemScratch() { ::operator delete(memory, kAlignment); }

ItemRun::ItemRun(const DecodeProblem& problem, const Kernels& kernels, const Item& item,
                 ItemScratch& scratch)
    : problem_(problem), kernels_(kernels), item_(item), scratch_(scratch) {
  head_dim_ = static_cast<int>(problem.head_dim);
  padded_ = (item.columns() + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  length_ = problem.seqlen_k;
  if (problem.paged.seq_lens != nullptr)
    length_ = max64(0, min64(problem.paged.seq_lens[item.batch], length_));
  kv_head_ = item.head / (problem.num_heads / problem.num_kv_heads);
  logit_scale_ = problem.softmax_scale;
  if (problem.k_scale != nullptr) logit_scale_ *= problem.k_scale[kv_head_];
}

void ItemRun::start() {
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

int64_t ItemRun::keys_end() const {
  return problem_.causal ? min64(length_, length_ - problem_.seqlen_q + item_.row + item_.rows)
                         : length_;
}

void ItemRun::gather(int64_t j, ItemStep* step) const {
  int64_t first_column = 0;
  if (problem_.causal) {
    const int64_t row = j - (length_ - problem_.seqlen_q);  // the first that sees it
    first_column = max64(0, row - item_.row) * item_.heads;
    if (first_column >= item_.columns()) return;
  }
  int64_t batch = item_.batch;
  int64_t row = j;
  const PagedKv& paged = problem_.paged;
  if (paged.block_table != nullptr) {
    batch = paged.block_table[item_.batch * paged.table_stride_batch + j / paged.page_size];
    if (batch < 0 || batch >= paged.num_pages) return;
    row = j % paged.page_size;
  }
  step->keys[step->count++] = {batch, row, static_cast<int>(first_column)};
}

void ItemRun::widen_rows(const HeadTensor& tensor, const ItemStep& step, float* to) const {
  const int64_t size = element_size(problem_.dtype, problem_.code);
  for (int i = 0; i < step.count; ++i, to += head_dim_) {
    const ItemKey& key = step.keys[i];
    const int64_t offset = key.batch * tensor.stride_batch + kv_head_ * tensor.stride_head +
                           key.row * tensor.stride_row;
    widen_elements(kernels_, static_cast<const char*>(tensor.data) + offset * size, problem_.dtype,
                   problem_.code, head_dim_, to);
  }
}

void ItemRun::logits(const ItemStep& step, float* s) const {
  widen_rows(problem_.k, step, scratch_.k);
  kernels_.scores(scratch_.query_t, scratch_.k, head_dim_, step.count, head_dim_, logit_scale_,
                  padded_, s);
  for (int i = 0; i < step.count; ++i)
    std::fill_n(s + i * kColumns, step.keys[i].first_column, -kInfinity);
}

void ItemRun::attend(const ItemStep& step, float* s) {
  kernels_.softmax(s, step.count, padded_, scratch_.row_max, scratch_.row_sum, scratch_.rescale);
  widen_rows(problem_.v, step, scratch_.v);
  const bool masked = std::any_of(step.keys, step.keys + step.count,
                                  [](const ItemKey& key) { return key.first_column > 0; });
  if (masked) return add_values_apart(step, s);
  kernels_.accumulate(s, scratch_.v, head_dim_, step.count, head_dim_, scratch_.rescale, padded_,
                      scratch_.out_t);
}

// A masked key has p = 0, but 0 * NaN is NaN: values that are not finite are zeros in the product,
// and added to the columns that see their key. The others' bits do not depend on them.
void ItemRun::add_values_apart(const ItemStep& step, const float* p) {
  const int64_t values = static_cast<int64_t>(step.count) * head_dim_;
  float* finite = scratch_.k;  // the keys are no longer needed
  std::transform(scratch_.v, scratch_.v + values, finite,
                 [](float x) { return std::isfinite(x) ? x : 0.0f; });
  kernels_.accumulate(p, finite, head_dim_, step.count, head_dim_, scratch_.rescale, padded_,
                      scratch_.out_t);
  for (int64_t at = 0; at < values; ++at) {
    const float value = scratch_.v[at];
    if (std::isfinite(value)) continue;
    const int64_t key = at / head_dim_;
    float* out = scratch_.out_t + at % head_dim_ * kColumns;
    for (int c = step.keys[key].first_column; c < item_.columns(); ++c)
      out[c] += p[key * kColumns + c] * value;
  }
}

void ItemRun::finish() {
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
      problem_.lse.data[item_.batch * problem_.lse.stride_batch + head * problem_.lse.stride_head +
                        row * problem_.lse.stride_row] =
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

void check_decode(const char* op, const DecodeProblem& problem) {
  require_supported(op, Backend::kCpu, problem.dtype, problem.head_dim);
  const std::string name = std::string(op) + ": ";
  if (problem.num_kv_heads <= 0 || problem.num_heads % problem.num_kv_heads != 0)
    throw InvalidArgument(name + "the query heads must be a multiple of the KV heads");
  if (problem.seqlen_q < 0 || problem.seqlen_q > kMaxDecodeRows)
    throw InvalidArgument(name + "at most " + std::to_string(kMaxDecodeRows) + " new rows, got " +
                          std::to_string(problem.seqlen_q));
}

}  // namespace attnsieve::cpu
