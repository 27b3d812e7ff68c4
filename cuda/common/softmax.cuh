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

// Multiplies row r of a (row, column) tensor by factors[r].
template <class Rows, int kRows>
__device__ __forceinline__ void rescale_rows(Rows&& rows, const float (&factors)[kRows]) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int column = 0; column < cute::size<1>(rows); ++column) rows(row, column) *= factors[row];
  }
}

// What a row stores: out = scale * accumulator, and its log-sum-exp.
struct RowResult {
  float scale;
  float lse;
};

// `row_max` is an unscaled logit, `row_sum` the whole sum of its row relative to `base`, `sink` a
// further logit or -inf. A row that saw nothing gets scale 0 and lse -inf; with a sink, 0 and the
// sink.
__device__ __forceinline__ RowResult finish_row(float row_max, float base, float row_sum,
                                                float softmax_scale, float sink) {
  const float scale_log2 = softmax_scale * kLog2e;
  // Undoing the rounding of the base keeps the lse of large logits within one rounding.
  const bool empty = row_max == negative_infinity();
  const float correction = empty ? 1.0f : exp2_approx(-fmaf(row_max, scale_log2, -base));
  const float sum = row_sum * correction;
  const float max_logit = row_max * softmax_scale;
  const bool sink_leads = sink > max_logit;
  const float rescale = sink_leads ? exp2_approx((max_logit - sink) * kLog2e) : 1.0f;
  float sink_weight = sink_leads ? 1.0f : 0.0f;
  if (!sink_leads && sink != negative_infinity()) {
    sink_weight = exp2_approx((sink - max_logit) * kLog2e);
  }
  const float total = sum * rescale + sink_weight;
  RowResult result;
  result.scale = total == 0.0f ? 0.0f : rescale * correction / total;
  result.lse = negative_infinity();
  if (sink_leads) {
    result.lse = sink + logf(total);
  } else if (total != 0.0f) {
    result.lse = fmaf(row_max, softmax_scale, logf(total));
  }
  return result;
}
__device__ __forceinline__ RowResult finish_row(float row_max, float row_sum, float softmax_scale,
                                                float sink) {
  return finish_row(row_max, base_of(row_max, softmax_scale * kLog2e), row_sum, softmax_scale,
                    sink);
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

  // One row of a step under way.
  struct Row {
    float base;
    float rescale;  // factor for what the row's output gathered so far
    float sums[2];  // two chains of additions
  };

  // Takes the step's maximum into the state.
  __device__ Row begin(int row, float step_max, float scale_log2) {
    const float next_max = max_nan(row_max[row], step_max);
    Row step;
    // A row without a finite logit keeps base 0, so that -inf - base stays -inf instead of NaN.
    step.base = next_max == negative_infinity() ? 0.0f : base_of(next_max, scale_log2);
    step.rescale = exp2_approx(base_of(row_max[row], scale_log2) - step.base);
    step.sums[0] = row_sum[row] * step.rescale;
    step.sums[1] = 0.0f;
    row_max[row] = next_max;
    return step;
  }

  // The row's scores, (row, column), become weights; their sum enters the state.
  template <class Scores>
  __device__ void weigh(int row, Row& step, Scores&& scores, float scale_log2) {
#pragma unroll
    for (int column = 0; column < cute::size<1>(scores); ++column) {
      const float weight = exp2_approx(fmaf(scores(row, column), scale_log2, -step.base));
      scores(row, column) = weight;
      step.sums[column % 2] += weight;
    }
    row_sum[row] = step.sums[0] + step.sums[1];
  }

  // Both, for rows whose order does not matter. Returns the factor for the output.
  template <class Scores>
  __device__ float weigh(int row, Scores&& scores, float step_max, float scale_log2) {
    Row step = begin(row, step_max, scale_log2);
    weigh(row, step, scores, scale_log2);
    return step.rescale;
  }

  // A whole step, `out` (row, column) included.
  template <class Scores, class Out>
  __device__ void update(Scores&& scores, Out&& out, const float (&step_max)[kRows],
                         float scale_log2) {
    float rescale[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      rescale[row] = weigh(row, scores, step_max[row], scale_log2);
    }
    rescale_rows(out, rescale);
  }
};

}  // namespace attnsieve
