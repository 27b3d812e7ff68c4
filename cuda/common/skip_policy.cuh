// SkipPolicy: may this tile be skipped? Decides nothing but that; the mainloop owns the order of
// loads.
//   kVotes          whether a vote happens at all (compiled out of the dense kernel otherwise)
//   kUnitsPerTile   most units that one vote covers
#pragma once

#include "attnsieve/problem.h"
#include "cuda/common/numeric.cuh"

namespace attnsieve {

// Whether a row keeps a tile from being skipped. A row that sees nothing in the tile never does; a NaN
// always does; lambda = 0, and one that is no number, keeps everything. Maxima are unscaled logits.
__device__ __forceinline__ bool row_vetoes(float tile_max, float running_max, float scale_log2,
                                           float log2_lambda) {
  const bool below = (tile_max - running_max) * scale_log2 < log2_lambda;
  const bool nothing = tile_max == negative_infinity() && log2_lambda > negative_infinity();
  return !(below || nothing);
}

struct NoSkip {
  static constexpr bool kVotes = false;
  static constexpr int kUnitsPerTile = 1;
  __device__ NoSkip(const AttendProblem&, int /*batch*/, int /*head*/) {}
};

// Skip a tile iff for every row m_tile - m_run < ln(lambda) (BLASST).
class ThresholdSkip {
 public:
  static constexpr bool kVotes = true;
  static constexpr int kUnitsPerTile = 2;

  __device__ ThresholdSkip(const AttendProblem& p, int batch, int head) {
    const Threshold& t = p.threshold;
    float lambda = t.value;
    if (t.per_head != nullptr) lambda = t.per_head[batch * t.stride_batch + head * t.stride_head];
    log2_lambda_ = log2f(lambda);
    scale_log2_ = p.softmax_scale * kLog2e;
    counters_ = t.counters == nullptr ? nullptr : t.counters + (batch * p.num_heads + head) * 2;
  }

  // The same rule for scores: one keeps the tile if it is not below fmaxf(running maximum + offset(),
  // lowest_limit()).
  __device__ float offset() const { return log2_lambda_ / scale_log2_; }
  __device__ float lowest_limit() const {
    return log2_lambda_ > negative_infinity() ? -3.402823466e38f : negative_infinity();
  }

  __device__ bool row_vetoes(float tile_max, float running_max) const {
    return attnsieve::row_vetoes(tile_max, running_max, scale_log2_, log2_lambda_);
  }

  __device__ void count(int skipped, int total) {
    skipped_ += skipped;
    total_ += total;
  }

  // Called by one thread of the group.
  __device__ void store_counters() const {
    if (counters_ == nullptr) return;
    auto* counters = reinterpret_cast<unsigned long long*>(counters_);
    atomicAdd(counters, static_cast<unsigned long long>(skipped_));
    atomicAdd(counters + 1, static_cast<unsigned long long>(total_));
  }

 private:
  float log2_lambda_;
  float scale_log2_;
  int64_t* counters_;
  int skipped_ = 0;
  int total_ = 0;
};

}  // namespace attnsieve
