// Final normalisation, sink logit, LSE and predicated stores of one warpgroup's 64 rows.
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "cuda/sm90/attend/products.cuh"

namespace attnsieve::sm90 {

// The output passes through the warpgroup's Q tile, which nobody reads any more, so that rows leave
// in 16-byte chunks. Each warp stages and stores its own 16 rows.
template <class Config, class Mainloop>
__device__ void store_output(const AttendProblem& problem, const Work& work,
                             const Mainloop& mainloop, typename Config::SharedStorage& smem,
                             typename Mainloop::FragmentO& acc_o, const LazySoftmax& softmax) {
  using Element = typename Config::Element;
  // Opaque, or the addresses below would be formed ahead of the main loop and live through it.
  int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  asm volatile("" : "+r"(thread));
  const auto [head, row, row_end] = mainloop.rows_of(work);
  const int warp = thread / kWarpThreads;
  const int lane = thread % kWarpThreads;
  const float sink =
      problem.sink == nullptr || head >= work.head_end ? negative_infinity() : problem.sink[head];
  Element* const staged = smem.q + mainloop.query_tile() * Config::kQueryElements;
  const int64_t batch = problem.varlen.cu_seqlens_q != nullptr ? 0 : work.batch;
  // Every warp's MMAs on the Q tile are done before any warp overwrites it.
  named_barrier_sync(kWarpgroupBarrier + static_cast<int>(threadIdx.x) / kWarpgroupThreads,
                     kWarpgroupThreads);
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowResult result =
        softmax.finish(half, quad_sum(softmax.row_sum[half]), problem.softmax_scale, sink);
    scale[half] = result.scale;
    const int query_row = row + warp * 16 + lane / 4 + half * 8;
    if (problem.lse.data != nullptr && lane % 4 == 0 && query_row >= 0 && query_row < row_end) {
      problem.lse.data[batch * problem.lse.stride_batch + head * problem.lse.stride_head +
                       static_cast<int64_t>(work.token_q + query_row) * problem.lse.stride_row] =
          result.lse;
    }
  }
  // Four 8x8 matrices at once: rows 0 and 8 of columns 0, then of columns 8.
  Element* const lane_row =
      staged + Config::offset_in_tile(warp * 16 + lane % 16, 0, kWarpgroupRows, false);
  const int swizzle = Config::swizzle(lane % 16) ^ lane / 16;
#pragma unroll
  for (int i = 0; i < Config::kHeadDim / 16; ++i) {
    uint32_t matrices[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* const values = &acc_o((2 * i + j / 2) * 4 + j % 2 * 2);
      Element pair[2] = {static_cast<Element>(values[0] * scale[j % 2]),
                         static_cast<Element>(values[1] * scale[j % 2])};
      matrices[j] = reinterpret_cast<const uint32_t&>(pair);
    }
    constexpr int kColumns = Config::kSliceColumns;
    Element* const target = lane_row + i * 16 / kColumns * kWarpgroupRows * kColumns +
                            ((i * 16 % kColumns / 8 ^ swizzle) - Config::swizzle(lane % 16)) * 8;
    SM90_U32x4_STSM_N::copy(matrices[0], matrices[1], matrices[2], matrices[3],
                            *reinterpret_cast<uint128_t*>(target));
  }
  __syncwarp();
  constexpr int kChunks = Config::kHeadDim / 8;  // of 16 bytes in a row
  constexpr int kRowLanes = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
  constexpr int kPassRows = kWarpThreads / kRowLanes;
  const int chunk = lane % kRowLanes;
  const int first_row = warp * 16 + lane / kRowLanes;
  const int64_t stride = problem.out.stride_row;
  Element* target = static_cast<Element*>(problem.out.data) + batch * problem.out.stride_batch +
                    head * problem.out.stride_head +
                    static_cast<int64_t>(work.token_q + row + first_row) * stride + chunk * 8;
  uint4 chunks[16 / kPassRows];
#pragma unroll
  for (int pass = 0; pass < 16 / kPassRows; ++pass) {
    chunks[pass] = *reinterpret_cast<const uint4*>(
        staged + Config::offset_in_tile(first_row + pass * kPassRows, chunk % kChunks * 8,
                                        kWarpgroupRows, false));
  }
#pragma unroll
  for (int pass = 0; pass < 16 / kPassRows; ++pass) {
    const int query_row = row + first_row + pass * kPassRows;
    if (chunk < kChunks && query_row >= 0 && query_row < row_end) {
      *reinterpret_cast<uint4*>(target) = chunks[pass];
    }
    target += kPassRows * stride;
  }
  // The next bulk copy into this tile comes after these reads.
  fence_shared_for_async();
}

}  // namespace attnsieve::sm90
