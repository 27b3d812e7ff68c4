// Final normalisation, sink logit, LSE and predicated stores.
#pragma once

#include "cuda/sm80/attend/mainloop.cuh"

namespace attnsieve::sm80 {

// out = acc_o / sum, lse = ln(sum exp(logits)). A row that saw nothing stores 0 and -inf; with a
// sink, 0 and the sink.
template <class Config, class Mainloop, int kRows>
__device__ void store_output(const AttendProblem& problem, const WorkTile& tile,
                             const Mainloop& mainloop, typename Config::SharedStorage& smem,
                             typename Mainloop::FragmentO& acc_o, OnlineSoftmax<kRows>& softmax) {
  using Element = typename Config::Element;
  constexpr float kLn2 = 0.6931471805599453f;
  const float scale_log2 = problem.softmax_scale * kLog2e;
  const float sink_log2 =
      problem.sink == nullptr ? negative_infinity() : problem.sink[tile.head] * kLog2e;
  auto out = make_tensor(acc_o.data(), as_rows_columns(acc_o.layout()));
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float sum = quad_sum(softmax.row_sum[row]);
    const float row_max = softmax.row_max[row];
    const float max_log2 =
        row_max == negative_infinity() ? negative_infinity() : row_max * scale_log2;
    const float base = max_nan(max_log2, sink_log2);
    const float safe_base = base == negative_infinity() ? 0.0f : base;
    const float rescale = exp2_approx(max_log2 - safe_base);
    const float total = sum * rescale + exp2_approx(sink_log2 - safe_base);
    const float scale = total == 0.0f ? 0.0f : rescale / total;
    const float lse = total == 0.0f ? negative_infinity() : (safe_base + log2f(total)) * kLn2;
#pragma unroll
    for (int column = 0; column < size<1>(out); ++column) out(row, column) *= scale;
    const int query_row = mainloop.query_row(row);
    if (problem.lse.data != nullptr && threadIdx.x % 4 == 0 && query_row < tile.row_end) {
      problem.lse.data[tile.batch * problem.lse.stride_batch + tile.head * problem.lse.stride_head +
                       static_cast<int64_t>(tile.token_q + query_row) * problem.lse.stride_row] =
          lse;
    }
  }

  typename Config::TiledMma mma;
  const auto thread_mma = mma.get_thread_slice(threadIdx.x);
  auto sO = make_tensor(make_smem_ptr(smem.q), typename Config::SmemLayoutUnit{});  // (M, D)
  auto tOsO = thread_mma.partition_C(sO);  // (MMA, M, N)
#pragma unroll
  for (int i = 0; i < size(acc_o); i += 2) {
    tOsO(i) = static_cast<Element>(acc_o(i));
    tOsO(i + 1) = static_cast<Element>(acc_o(i + 1));
  }
  __syncthreads();
  const int64_t offset =
      tile.batch * problem.out.stride_batch + tile.head * problem.out.stride_head +
      static_cast<int64_t>(tile.token_q + tile.row_begin) * problem.out.stride_row;
  TileCopy<Config>().store(static_cast<Element*>(problem.out.data) + offset, smem.q,
                           problem.out.stride_row, tile.row_end - tile.row_begin);
}

}  // namespace attnsieve::sm80
