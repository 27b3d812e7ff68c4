// Online softmax over the two rows of a thread, whose base is moved only when a score exceeds it by
// 2^kTolerance: weights, their sum and the output stay in range until then, and most tiles rescale
// nothing. What has to be known of a tile before its weights is whether a score does that, not its
// maxima; integers tell it three at a time, and lanes of a row need not agree on anything.
#pragma once

#include "cuda/common/softmax.cuh"
#include "cuda/sm90/attend/rows.cuh"

namespace attnsieve::sm90 {

class LazySoftmax {
 public:
  // Weights are at most 256: float16 has room for them.
  static constexpr float kTolerance = 8.0f;

  __device__ LazySoftmax() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      base_[row] = 0.0f;
      row_sum[row] = 0.0f;
      has_base_[row] = false;
    }
  }

  // Of a score: the exponent of its weight.
  __device__ float exponent(int row, float score, float scale_log2) const {
    return fmaf(score, scale_log2, -base_[row]);
  }
  // Scores of a row, (row, column), become exponents.
  template <class Scores>
  __device__ void relate(int row, Scores&& scores, float scale_log2) const {
#pragma unroll
    for (int column = 0; column < cute::size<1>(scores); ++column) {
      scores(row, column) = exponent(row, scores(row, column), scale_log2);
    }
  }

  // Whether a lane's greatest exponent moves the base. Compared as integers, among which positive
  // numbers keep their order and lie above negative ones: positive_maximum() serves as well.
  __device__ bool exceeds(int row, float greatest) const {
    return !has_base_[row] || __float_as_int(greatest) > __float_as_int(kTolerance);
  }

  // Moves the base of a row, of all lanes of a quad, to its greatest exponent where that exceeds it.
  // `greatest` is the lane's. Returns the factor for what the output gathered so far.
  template <class Scores>
  __device__ float raise(int row, Scores&& scores, float greatest) {
    greatest = quad_max(greatest);
    if (has_base_[row] ? !(greatest > kTolerance) : greatest == negative_infinity()) return 1.0f;
    const float next = base_[row] + greatest;
    const float rise = next - base_[row];  // rounded as the base is
    base_[row] = next;
#pragma unroll
    for (int column = 0; column < cute::size<1>(scores); ++column) scores(row, column) -= rise;
    const float rescale = has_base_[row] ? exp2_approx(-rise) : 1.0f;
    has_base_[row] = true;
    row_sum[row] *= rescale;
    return rescale;
  }

  // The exponents of a row become weights; their sum enters the state.
  template <class Scores>
  __device__ void weigh(int row, Scores&& scores) {
    float sums[2] = {row_sum[row], 0.0f};
#pragma unroll
    for (int column = 0; column < cute::size<1>(scores); ++column) {
      const float weight = exp2_approx(scores(row, column));
      scores(row, column) = weight;
      sums[column % 2] += weight;
    }
    row_sum[row] = sums[0] + sums[1];
  }

  // `whole_sum` is that of all lanes of the row.
  __device__ RowResult finish(int row, float whole_sum, float softmax_scale, float sink) const {
    const float row_max =
        has_base_[row] ? base_[row] / (softmax_scale * kLog2e) : negative_infinity();
    return finish_row(row_max, base_[row], whole_sum, softmax_scale, sink);
  }

  float row_sum[2];  // this lane's part

 private:
  float base_[2];  // log2; 0 for a row that has seen no finite logit, whose sum and output are 0
  bool has_base_[2];
};

}  // namespace attnsieve::sm90
