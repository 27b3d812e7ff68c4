// Final normalisation, sink logit, LSE and predicated stores of one warpgroup's 64 rows.
#pragma once

#include "cuda/sm90/attend/mainloop.cuh"

namespace attnsieve::sm90 {

// The output passes through the warpgroup's Q tile, which nobody reads any more, so that rows leave
// in 16-byte chunks. Each warp stages and stores its own 16 rows.
template <class Config, class Mainloop>
__device__ void store_output(const AttendProblem& problem, const Work& work, int head, int row,
                             int row_end, const Mainloop& mainloop,
                             typename Config::SharedStorage& smem,
                             typename Mainloop::FragmentO& acc_o, const OnlineSoftmax<2>& softmax) {
  using Element = typename Config::Element;
  // Opaque, or the addresses below would be formed ahead of the main loop and live through it.
  int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  asm volatile("" : "+r"(thread));
  const int warp = thread / kWarpThreads;
  const int lane = thread % kWarpThreads;
  const float sink =
      problem.sink == nullptr || head >= work.head_end ? negative_infinity() : problem.sink[head];
  Element* const staged = smem.q + mainloop.query_tile() * Config::kQueryElements;
  const int64_t batch = problem.varlen.cu_seqlens_q != nullptr ? 0 : work.batch;
  // Every warp's MMAs on the Q tile are done before any warp overwrites it.
  named_barrier_sync(kWarpgroupBarrier + static_cast<int>(threadIdx.x) / kWarpgroupThreads,
                     kWarpgroupThreads);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowResult result = finish_row(softmax.row_max[half], quad_sum(softmax.row_sum[half]),
                                        problem.softmax_scale, sink);
    const int tile_row = warp * 16 + lane / 4 + half * 8;
    const int query_row = row + tile_row;
    if (problem.lse.data != nullptr && lane % 4 == 0 && query_row >= 0 && query_row < row_end) {
      problem.lse.data[batch * problem.lse.stride_batch + head * problem.lse.stride_head +
                       static_cast<int64_t>(work.token_q + query_row) * problem.lse.stride_row] =
          result.lse;
    }
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 8; ++i) {
      Element pair[2] = {static_cast<Element>(acc_o(i * 4 + half * 2) * result.scale),
                         static_cast<Element>(acc_o(i * 4 + half * 2 + 1) * result.scale)};
      *reinterpret_cast<uint32_t*>(
          staged + Config::offset_in_tile(tile_row, i * 8, kWarpgroupRows, false) + lane % 4 * 2) =
          reinterpret_cast<const uint32_t&>(pair);
    }
  }
  __syncwarp();
  constexpr int kChunks = Config::kHeadDim / 8;  // of 16 bytes in a row
  Element* const out = static_cast<Element*>(problem.out.data) + batch * problem.out.stride_batch +
                       head * problem.out.stride_head;
#pragma unroll
  for (int i = lane; i < 16 * kChunks; i += kWarpThreads) {
    const int tile_row = warp * 16 + i / kChunks;
    const int column = i % kChunks * 8;
    const int query_row = row + tile_row;
    if (query_row < 0 || query_row >= row_end) continue;
    *reinterpret_cast<uint4*>(
        out + static_cast<int64_t>(work.token_q + query_row) * problem.out.stride_row + column) =
        *reinterpret_cast<const uint4*>(
            staged + Config::offset_in_tile(tile_row, column, kWarpgroupRows, false));
  }
  // The next bulk copy into this tile comes after these reads.
  fence_shared_for_async();
}

}  // namespace attnsieve::sm90
