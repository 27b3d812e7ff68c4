#include "cpu/proxy_chunk.h"

#include <algorithm>
#include <limits>
#include <new>
#include <numeric>

#include "attnsieve/visibility.h"
#include "cpu/codes.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::align_val_t kAlignment{64};
constexpr int64_t kItemUnits = 4 * kChunkUnits;

}  // namespace

ProxyPlan::ProxyPlan(const ProxyScoresProblem& problem) {
  const bool rows_reduced = problem.row_reduce != Reduction::kNone;
  heads_per_key = problem.num_heads / problem.num_key_heads;
  heads_per_out = problem.num_heads / problem.num_out_heads;
  span = std::lcm(heads_per_key, heads_per_out);
  pass_rows = min64(problem.num_rows, kColumns);
  pass_heads = min64(heads_per_key, kColumns / pass_rows);
  out_rows = rows_reduced ? 1 : problem.num_rows;
  item_rows = rows_reduced ? problem.num_rows : pass_rows;
  item_out_rows = rows_reduced ? 1 : pass_rows;
  const int64_t page = problem.units_per_column();
  item_units = (kItemUnits + page - 1) / page * page;
  row_blocks = (problem.num_rows + item_rows - 1) / item_rows;
  spans = problem.num_heads / span;
  ranges = (problem.units + item_units - 1) / item_units;
  width = problem.element == ProxyElement::kBounds ? 2 * problem.head_dim : problem.head_dim;
  out_columns = item_out_rows * (span / heads_per_out);
}

ProxyScratch::ProxyScratch(const ProxyPlan& plan) {
  const int64_t floats = (2 * kColumns + kUnitKeys) * plan.width + kUnitKeys * kColumns +
                         kChunkUnits * (kColumns + plan.out_columns) + 4 * kColumns +
                         2 * (plan.out_columns + plan.item_out_rows);
  memory = ::operator new(floats * sizeof(float), kAlignment, std::nothrow);
  if (memory == nullptr) return;
  query = static_cast<float*>(memory);
  std::fill_n(query, floats, 0.0f);
  query_t = query + kColumns * plan.width;
  keys = query_t + kColumns * plan.width;
  tile = keys + kUnitKeys * plan.width;
  rows = tile + kUnitKeys * kColumns;
  weight = rows + kChunkUnits * kColumns;
  row_max = weight + kColumns;
  row_sum = row_max + kColumns;
  rescale = row_sum + kColumns;
  heads = rescale + kColumns;
  page = reinterpret_cast<double*>(heads + kChunkUnits * plan.out_columns);
  members = reinterpret_cast<int64_t*>(page + plan.out_columns);
}

ProxyScratch::~ProxyScratch() { ::operator delete(memory, kAlignment); }

ProxyChunk::ProxyChunk(const ProxyScoresProblem& problem, const ProxyPlan& plan,
                       const Kernels& kernels, int64_t batch, ProxyScratch& scratch)
    : problem_(problem), plan_(plan), kernels_(kernels), scratch_(scratch), batch_(batch) {
  rows_reduced_ = problem.row_reduce != Reduction::kNone;
  length_ = problem.units * problem.unit_keys();
  if (problem.pages.seq_lens != nullptr)
    length_ = max64(0, min64(problem.pages.seq_lens[batch], length_));
  begin_ = problem.skip_first;
  end_ = (length_ + problem.unit_keys() - 1) / problem.unit_keys() - problem.skip_last;
}

int64_t ProxyChunk::collect(int64_t unit, int64_t end) {
  const PagedKv& pages = problem_.pages;
  const int64_t last = min64(end, end_);
  count_ = 0;
  for (unit = max64(unit, begin_); unit < last && count_ < kChunkUnits; ++unit) {
    int64_t place = batch_;
    int64_t row = unit;
    if (pages.block_table != nullptr) {
      place = pages.block_table[batch_ * pages.table_stride_batch + unit / pages.page_size];
      row = unit % pages.page_size;
      if (place < 0 || place >= pages.num_pages) continue;
    }
    unit_[count_] = unit;
    place_[count_] = place;
    place_row_[count_] = row;
    const int64_t first_key = unit * problem_.unit_keys();
    first_row_[count_] = problem_.causal ? max64(0, first_key - length_ + problem_.num_rows) : 0;
    ++count_;
  }
  return unit < last ? unit : end;
}

void ProxyChunk::score(int64_t head, int heads, int64_t row, int rows) {
  for (int done = 0; done < rows; done += static_cast<int>(plan_.pass_rows)) {
    const int pass_rows = static_cast<int>(min64(plan_.pass_rows, rows - done));
    load_queries(head, heads, row + done, pass_rows);
    for (int first = 0; first < count_; first += kUnitKeys) {
      const int units = std::min(kUnitKeys, count_ - first);
      multiply(head / plan_.heads_per_key, first, units, heads * pass_rows);
      for (int i = 0; i < units; ++i) {
        const float* line = scratch_.tile + i * kColumns;
        if (rows_reduced_) {
          add_rows(first + i, line, heads, row + done, pass_rows);
        } else {
          keep_rows(first + i, line, heads, row + done, pass_rows);
        }
      }
    }
  }
  if (problem_.row_reduce != Reduction::kMean) return;
  for (int i = 0; i < count_; ++i) {
    const float seen = static_cast<float>(problem_.num_rows - first_row_[i]);
    for (int h = 0; h < heads; ++h) scratch_.rows[i * kColumns + h] /= seen;
  }
}

// The columns of a pass, rows x heads, and their weights.
void ProxyChunk::load_queries(int64_t head, int heads, int64_t row, int rows) {
  const HeadTensor& q = problem_.q;
  const RowTensor& weights = problem_.head_weights;
  const int64_t dim = problem_.head_dim;
  const int columns = heads * rows;
  for (int c = 0; c < columns; ++c) {
    const int64_t own_head = head + c % heads;
    const int64_t own_row = row + c / heads;
    const int64_t offset =
        batch_ * q.stride_batch + own_head * q.stride_head + own_row * q.stride_row;
    kernels_.widen(static_cast<const char*>(q.data) + offset * element_size(problem_.dtype),
                   problem_.dtype, 0, 1, dim, scratch_.query + c * dim);
    if (weights.data == nullptr) continue;
    scratch_.weight[c] =
        weights.data[batch_ * weights.stride_batch + own_head * weights.stride_head +
                     own_row * weights.stride_row];
  }
  if (problem_.element != ProxyElement::kBounds) return pack(columns, scratch_.query_t);
  float* const positive = scratch_.query + columns * dim;  // NaN goes into both parts
  for (int64_t i = 0; i < columns * dim; ++i) {
    const float x = scratch_.query[i];
    positive[i] = x < 0.0f ? 0.0f : x;
    scratch_.query[i] = x > 0.0f ? 0.0f : x;
  }
  pack(columns, scratch_.query_t);
  std::copy_n(positive, columns * dim, scratch_.query);
  pack(columns, scratch_.query_t + dim * kColumns);
}

void ProxyChunk::pack(int columns, float* query_t) {
  const int dim = static_cast<int>(problem_.head_dim);
  kernels_.pack_query(scratch_.query, DType::kFloat32, dim, columns, dim, padded(columns, kernels_),
                      query_t);
}

// scratch.tile[unit][column] = weight * element. Bounds are a product of twice the length,
// [q-, q+] . [min, max].
void ProxyChunk::multiply(int64_t key_head, int first, int units, int columns) {
  float* to = scratch_.keys;
  for (int i = first; i < first + units; ++i, to += plan_.width) {
    load_key(key_head, i, 0, to);
    if (problem_.element == ProxyElement::kBounds) load_key(key_head, i, 1, to + problem_.head_dim);
  }
  const int width = static_cast<int>(plan_.width);
  kernels_.scores(scratch_.query_t, scratch_.keys, width, units, width, problem_.score_scale,
                  padded(columns, kernels_), scratch_.tile);
  for (int i = 0; i < units; ++i) {
    float* line = scratch_.tile + i * kColumns;
    if (problem_.element == ProxyElement::kReluDot)
      for (int c = 0; c < columns; ++c) line[c] = line[c] < 0.0f ? 0.0f : line[c];
    if (problem_.head_weights.data != nullptr)
      for (int c = 0; c < columns; ++c) line[c] *= scratch_.weight[c];
  }
}

void ProxyChunk::load_key(int64_t key_head, int i, int64_t bound, float* to) {
  const auto offset_in = [&](const auto& tensor, int64_t stride_bound) {
    return place_[i] * tensor.stride_batch + key_head * tensor.stride_head +
           place_row_[i] * tensor.stride_row + bound * stride_bound;
  };
  const int64_t offset = offset_in(problem_.keys, problem_.keys_stride_bound);
  const int64_t size = element_size(problem_.dtype, problem_.key_code);
  widen_elements(kernels_, static_cast<const char*>(problem_.keys.data) + offset * size,
                 problem_.dtype, problem_.key_code, problem_.head_dim, to);
  if (problem_.key_scale.data == nullptr) return;
  const float scale =
      problem_.key_scale.data[offset_in(problem_.key_scale, problem_.key_scale_stride_bound)];
  for (int64_t d = 0; d < problem_.head_dim; ++d) to[d] *= scale;
}

// One unit's line of a tile, rows x heads, into scratch.rows.
void ProxyChunk::keep_rows(int i, const float* line, int heads, int64_t row, int rows) {
  float* to = scratch_.rows + i * kColumns;
  const int hidden = static_cast<int>(max64(0, min64(rows, first_row_[i] - row))) * heads;
  std::fill_n(to, hidden, -kInfinity);
  std::copy(line + hidden, line + rows * heads, to + hidden);
}

// The same, reduced over the rows that see the unit; the first of them starts the line.
void ProxyChunk::add_rows(int i, const float* line, int heads, int64_t row, int rows) {
  const int first = static_cast<int>(max64(0, first_row_[i] - row));
  if (first >= rows) return;
  const bool starts = row + first == first_row_[i];
  for (int h = 0; h < heads; ++h) {
    double sum = line[first * heads + h];
    for (int r = first + 1; r < rows; ++r)
      sum = combine(problem_.row_reduce, sum, line[r * heads + h]);
    float& out = scratch_.rows[i * kColumns + h];
    out = static_cast<float>(starts ? sum : combine(problem_.row_reduce, out, sum));
  }
}

}  // namespace attnsieve::cpu
