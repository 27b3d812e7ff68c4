// The inner part of cpu::proxy_scores: a chunk of units against the query vectors of some heads,
// rows reduced.
#pragma once

#include <cmath>
#include <cstdint>

#include "attnsieve/problem.h"
#include "kernels.h"

namespace attnsieve::cpu {

inline constexpr int kChunkUnits = 4 * kUnitKeys;

// How a problem is cut into items.
struct ProxyPlan {
  explicit ProxyPlan(const ProxyScoresProblem& problem);

  int64_t heads_per_key, heads_per_out;
  int64_t span;  // query heads of an item
  int64_t pass_rows, pass_heads;  // that fill the columns of one tile
  int64_t out_rows;  // rows of the scores
  int64_t item_rows, item_out_rows;
  int64_t item_units;  // a multiple of the page
  int64_t row_blocks, spans, ranges;
  int64_t width;  // of a tile's dot products
  int64_t out_columns;  // of an item: output rows x output heads
};

// The buffers of one thread, in one allocation; `memory` is nullptr where there was none.
struct ProxyScratch {
  explicit ProxyScratch(const ProxyPlan& plan);
  ~ProxyScratch();
  ProxyScratch(const ProxyScratch&) = delete;
  ProxyScratch& operator=(const ProxyScratch&) = delete;

  void* memory = nullptr;
  float *query, *query_t, *keys;  // of a pass and a tile
  float* tile;  // [kUnitKeys][kColumns]
  float* rows;  // [kChunkUnits][kColumns]: rows x query heads, or heads where rows are reduced
  float *weight, *row_max, *row_sum, *rescale;  // [kColumns]
  float* heads;  // [kChunkUnits][out_columns]: rows x output heads
  double* page;  // [out_columns]: the page so far
  int64_t* members;  // [item_out_rows]: candidates of the page so far
};

// One step of a reduction; NaN passes through. In double: a float32 sum over the keys of a page
// would be less exact than its terms.
inline double combine(Reduction how, double a, double b) {
  if (how == Reduction::kMax) return a > b || std::isnan(a) ? a : b;
  return a + b;
}

class ProxyChunk {
 public:
  ProxyChunk(const ProxyScoresProblem& problem, const ProxyPlan& plan, const Kernels& kernels,
             int64_t batch, ProxyScratch& scratch);

  // Gathers candidates among [unit, end) until the chunk is full; returns where to go on.
  int64_t collect(int64_t unit, int64_t end);

  // Scores query heads [head, head + heads), which share a key head, and rows [row, row + rows)
  // into scratch.rows. Entries of rows that do not see their unit are -inf.
  void score(int64_t head, int heads, int64_t row, int rows);

  int count() const { return count_; }
  int64_t unit(int i) const { return unit_[i]; }
  bool sees(int64_t row, int i) const { return rows_reduced_ || row >= first_row_[i]; }

 private:
  void load_queries(int64_t head, int heads, int64_t row, int rows);
  void pack(int columns, float* query_t);
  void multiply(int64_t key_head, int first, int units, int columns);
  void load_key(int64_t key_head, int i, int64_t bound, float* to);
  void keep_rows(int i, const float* line, int heads, int64_t row, int rows);
  void add_rows(int i, const float* line, int heads, int64_t row, int rows);

  const ProxyScoresProblem& problem_;
  const ProxyPlan& plan_;
  const Kernels& kernels_;
  ProxyScratch& scratch_;
  int64_t batch_;
  bool rows_reduced_;
  int64_t length_;  // keys
  int64_t begin_, end_;  // candidates
  int count_ = 0;
  int64_t unit_[kChunkUnits];
  int64_t place_[kChunkUnits];  // sequence or page, and the row there
  int64_t place_row_[kChunkUnits];
  int64_t first_row_[kChunkUnits];  // the first query row that sees the unit
};

static inline int padded(int columns, const Kernels& kernels) {
  return (columns + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
}

}  // namespace attnsieve::cpu
