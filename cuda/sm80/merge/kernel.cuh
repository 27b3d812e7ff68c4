// Computes        lse[r] = logsumexp_n lses[n, r];
//                 out[r, :] = sum_n exp(lses[n, r] - lse[r]) outs[n, r, :].
// Roles           A thread owns 16 bytes of one output row; a 1-D grid covers rows x chunks.
// Shared memory   none
// Invariants      A state with lse = -inf contributes nothing, whatever its values. All -inf, or no
//                 state: 0 and -inf.
// Not handled     head_dim that is not a multiple of 8.
#pragma once

#include "attnsieve/problem.h"
#include "cuda/common/numeric.cuh"

namespace attnsieve::sm80 {

inline constexpr int kMergeThreads = 256;

template <class Element>
__global__ void __launch_bounds__(kMergeThreads)
    merge_states_kernel(const __grid_constant__ MergeProblem problem) {
  constexpr int kVector = 16 / sizeof(Element);
  const int64_t chunks = problem.head_dim / kVector;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  const int64_t row = item / chunks;
  if (row >= problem.rows) return;
  const int64_t column = item % chunks * kVector;

  float lse_max = negative_infinity();
  for (int64_t n = 0; n < problem.num_states; ++n)
    lse_max = max_nan(lse_max, problem.lses[n * problem.rows + row]);
  float total = 0.0f;
  float sum[kVector] = {};
  for (int64_t n = 0; n < problem.num_states; ++n) {
    const float lse = problem.lses[n * problem.rows + row];
    if (lse == negative_infinity()) continue;
    const float weight = expf(lse - lse_max);
    total += weight;
    const auto* source = static_cast<const Element*>(problem.outs) +
                         (n * problem.rows + row) * problem.head_dim + column;
    alignas(16) Element values[kVector];
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(source);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += weight * to_float(values[i]);
  }
  const bool empty = lse_max == negative_infinity();
  alignas(16) Element values[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = from_float<Element>(empty ? 0.0f : sum[i] / total);
  *reinterpret_cast<uint4*>(static_cast<Element*>(problem.out) + row * problem.head_dim + column) =
      *reinterpret_cast<const uint4*>(values);
  if (column == 0) problem.lse[row] = empty ? lse_max : lse_max + logf(total);
}

}  // namespace attnsieve::sm80
