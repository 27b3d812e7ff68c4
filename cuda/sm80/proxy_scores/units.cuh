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

  // Of a unit in [0, problem.units): nowhere unless it is a candidate.
  __device__ UnitPlace place_of(int unit) const {
    constexpr UnitPlace kNowhere{-1, 0};
    if (!in_range(unit)) return kNowhere;
    const PagedKv& pages = problem_.pages;
    if (pages.block_table == nullptr) return {batch_, unit};
    const int slot = pages.page_size == 1 ? unit : unit / pages.page_size;
    const int page = pages.block_table[batch_ * pages.table_stride_batch + slot];
    if (page < 0 || page >= pages.num_pages) return kNowhere;
    return {page, unit - slot * pages.page_size};
  }

  // The first query row that sees a candidate.
  __device__ int first_row(int unit) const {
    if (!problem_.causal) return 0;
    const int64_t first_key = unit * problem_.unit_keys();
    return static_cast<int>(max64(0, first_key - length_ + problem_.num_rows));
  }

 private:
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
