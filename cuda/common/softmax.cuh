// Online softmax over one step of scores at a time, in base 2 with the scale folded in.
#pragma once

#include <cute/tensor.hpp>

#include "cuda/common/numeric.cuh"

namespace attnsieve {

// Rows of an m16n8 accumulator are spread over the four lanes of a quad.
__device__ __forceinline__ float quad_max(float x) {
  x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Weights are exp2(logit * scale_log2 - base). Rounded here and nowhere else, the base cancels
// between weights, rescaling and the final sum, however large the logits are.
__device__ __forceinline__ float base_of(float row_max, float scale_log2) {
  return __fmul_rn(row_max, scale_log2);
}

// Running maximum (unscaled logits), and this lane's part of the running sum, for kRows rows.
// Invariant: row_max is -inf iff the row has seen no finite logit; then row_sum and the output are
// 0.
template <int kRows>
struct OnlineSoftmax {
  float row_max[kRows];
  float row_sum[kRows];

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      row_max[row] = negative_infinity();
      row_sum[row] = 0.0f;
    }
  }

  // Folds a step with maxima `step_max` into the state: scores become weights, `out` is rescaled.
  // Both tensors are (row, column).
  template <class Scores, class Out>
  __device__ void update(Scores&& scores, Out&& out, const float (&step_max)[kRows],
                         float scale_log2) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float next_max = max_nan(row_max[row], step_max[row]);
      // A row without a finite logit keeps base 0, so that -inf - base stays -inf instead of NaN.
      const float base = next_max == negative_infinity() ? 0.0f : base_of(next_max, scale_log2);
      const float rescale = exp2_approx(base_of(row_max[row], scale_log2) - base);
      row_max[row] = next_max;
      row_sum[row] *= rescale;
#pragma unroll
      for (int column = 0; column < cute::size<1>(scores); ++column) {
        const float weight = exp2_approx(fmaf(scores(row, column), scale_log2, -base));
        scores(row, column) = weight;
        row_sum[row] += weight;
      }
#pragma unroll
      for (int column = 0; column < cute::size<1>(out); ++column) out(row, column) *= rescale;
    }
  }
};

}  // namespace attnsieve
