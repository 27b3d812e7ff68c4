// The units of one sequence: which are candidates, who sees them, and where they lie.
#pragma once

#include "attnsieve/visibility.h"
#include "cuda/common/numeric.cuh"
#include "cuda/sm80/proxy_scores/arguments.h"

namespace attnsieve::sm80 {

inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpThreads; }

// A sequence or a page, and a row there.
struct UnitPlace {
  int outer;  // negative: nowhere
  int row;
};

class ScoredUnits {
 public:
  __device__ ScoredUnits(const ProxyScoresProblem& problem, int batch)
      : problem_(problem), batch_(batch), length_(problem.units * problem.unit_keys()) {
    if (problem.pages.seq_lens != nullptr) {
      length_ = max64(0, min64(problem.pages.seq_lens[batch], length_));
    }
    begin_ = static_cast<int>(min64(problem.skip_first, problem.units));
    const int64_t keys = problem.unit_keys();
    const int64_t units = keys == 1 ? length_ : (length_ + keys - 1) / keys;
    end_ = static_cast<int>(max64(0, units - problem.skip_last));
  }

  __device__ bool in_range(int unit) const { return unit >= begin_ && unit < end_; }

  // Where a unit in [0, problem.units) lies; nowhere unless it is a candidate.
  __device__ UnitPlace place_of(int unit) const { return place_of(unit, outer_of(unit)); }

  // The first half of place_of, which loads: the sequence or what the table says, right or wrong.
  __device__ int outer_of(int unit) const {
    if (!in_range(unit)) return -1;
    const PagedKv& pages = problem_.pages;
    if (pages.block_table == nullptr) return batch_;
    return pages.block_table[batch_ * pages.table_stride_batch + slot_of(unit)];
  }

  // The second, which computes.
  __device__ UnitPlace place_of(int unit, int outer) const {
    const PagedKv& pages = problem_.pages;
    if (pages.block_table == nullptr) return {outer, unit};
    if (outer >= pages.num_pages) outer = -1;
    return {outer, unit - slot_of(unit) * pages.page_size};
  }

  // The first query row that sees a candidate.
  __device__ int first_row(int unit) const {
    if (!problem_.causal) return 0;
    const int64_t first_key = unit * problem_.unit_keys();
    return static_cast<int>(max64(0, first_key - length_ + problem_.num_rows));
  }

 private:
  __device__ int slot_of(int unit) const {
    const int page_size = problem_.pages.page_size;
    return page_size == 1 ? unit : unit / page_size;
  }

  const ProxyScoresProblem& problem_;
  int batch_;
  int begin_, end_;  // candidates, where their pages exist
  int64_t length_;   // keys
};

// One step of a reduction; NaN passes. In double: a float32 sum over the keys of a page would be
// less exact than its terms.
__device__ __forceinline__ double combine(Reduction how, double a, double b) {
  if (how == Reduction::kMax) return a > b || a != a ? a : b;
  return a + b;
}

}  // namespace attnsieve::sm80
