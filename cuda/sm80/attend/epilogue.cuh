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
  const float sink = problem.sink == nullptr ? negative_infinity() : problem.sink[tile.head];
  auto out = make_tensor(acc_o.data(), as_rows_columns(acc_o.layout()));
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const RowResult result = finish_row(softmax.row_max[row], quad_sum(softmax.row_sum[row]),
                                        problem.softmax_scale, sink);
#pragma unroll
    for (int column = 0; column < size<1>(out); ++column) out(row, column) *= result.scale;
    const int query_row = mainloop.query_row(row);
    if (problem.lse.data != nullptr && threadIdx.x % 4 == 0 && query_row < tile.row_end) {
      problem.lse.data[tile.batch * problem.lse.stride_batch + tile.head * problem.lse.stride_head +
                       static_cast<int64_t>(tile.token_q + query_row) * problem.lse.stride_row] =
          result.lse;
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
