// From the partial results of warps, and of chunks, to the output of an item.
#pragma once

#include "cuda/sm80/decode/mainloop.cuh"

namespace attnsieve::sm80 {

// The factor that brings sums relative to `max` to those relative to `total_max`. A part that saw
// nothing weighs nothing.
__device__ __forceinline__ float part_weight(float max, float total_max, float scale_log2) {
  if (max == negative_infinity()) return 0.0f;
  return exp2_approx(base_of(max, scale_log2) - base_of(total_max, scale_log2));
}

// Leaves a warp's result in its shared memory, whose stages are no longer needed.
template <class Element, int kHeadDim, int kColumnTiles>
__device__ void publish(
    DecodeWarp<Element, kHeadDim, kColumnTiles>& warp,
    typename DecodeConfig<Element, kHeadDim, kColumnTiles>::WarpStorage& smem) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
#pragma unroll
  for (int i = 0; i < 2 * kColumnTiles; ++i) {
    float sum = warp.softmax.row_sum[i];
#pragma unroll
    for (int distance = 4; distance < kWarpThreads; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    const int column = i / 2 * kTileColumns + lane % 4 * 2 + i % 2;
    if (lane < 4) {
      smem.merge.max[column] = warp.softmax.row_max[i];
      smem.merge.sum[column] = sum;
    }
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        smem.merge.out[column][step * 16 + half * 8 + lane / 4] =
            warp.out[step][i / 2][half * 2 + i % 2];
      }
    }
  }
}

// Stores row `column` of an item: the state of all its keys, and the sink.
template <class Element>
__device__ __forceinline__ void store_column(const DecodeProblem& p, const DecodeItem& item,
                                             int column, int dim, float value, float max,
                                             float sum) {
  const int row = item.row + column / item.heads;
  const int head = item.head + column % item.heads;
  const float sink = p.sink == nullptr ? negative_infinity() : p.sink[head];
  const RowResult result = finish_row(max, sum, p.softmax_scale, sink);
  auto* out = static_cast<Element*>(p.out.data) + item.batch * p.out.stride_batch +
              head * p.out.stride_head + row * p.out.stride_row;
  // A column that saw nothing holds zeros; its scale is 0.
  out[dim] = static_cast<Element>(value * result.scale);
  if (dim == 0 && p.lse.data != nullptr) {
    p.lse.data[item.batch * p.lse.stride_batch + head * p.lse.stride_head +
               row * p.lse.stride_row] = result.lse;
  }
}

// The warps' results of a chunk, in warp order: to the output where the item has no other chunk, else
// to the chunk's place in the workspace.
template <class Element, int kHeadDim, int kColumnTiles, class WarpStorage>
__device__ void merge_warps(const DecodeArguments& a, const DecodeItem& item, int64_t slot,
                            bool whole, const WarpStorage* smem) {
  const float scale_log2 = a.problem.softmax_scale * kLog2e;
  const int columns = item.heads * a.plan.rows;
  for (int i = threadIdx.x; i < columns * kHeadDim; i += kDecodeThreads) {
    const int column = i / kHeadDim;
    const int dim = i % kHeadDim;
    float max = negative_infinity();
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      max = max_nan(max, smem[warp].merge.max[column]);
    }
    float sum = 0.0f;
    float value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      const float weight = part_weight(smem[warp].merge.max[column], max, scale_log2);
      sum += weight * smem[warp].merge.sum[column];
      value += weight * smem[warp].merge.out[column][dim];
    }
    if (whole) {
      store_column<Element>(a.problem, item, column, dim, value, max, sum);
    } else {
      const int64_t place = slot * a.plan.columns + column;
      a.partial_out[place * kHeadDim + dim] = value;
      if (dim == 0) {
        a.partial_max[place] = max;
        a.partial_sum[place] = sum;
      }
    }
  }
}

// The chunks' results of an item, in their order whoever computed them.
template <class Element, int kHeadDim>
__device__ void merge_chunks(const DecodeArguments& a, const DecodeItem& item, int64_t first_slot,
                             int chunks) {
  const float scale_log2 = a.problem.softmax_scale * kLog2e;
  const int columns = item.heads * a.plan.rows;
  for (int i = threadIdx.x; i < columns * kHeadDim; i += kDecodeThreads) {
    const int column = i / kHeadDim;
    const int dim = i % kHeadDim;
    const auto place_of = [&](int chunk) {
      return (first_slot + chunk) * a.plan.columns + column;
    };
    float max = negative_infinity();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      max = max_nan(max, __ldcg(a.partial_max + place_of(chunk)));
    }
    float sum = 0.0f;
    float value = 0.0f;
#pragma unroll 4
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int64_t place = place_of(chunk);
      const float weight = part_weight(__ldcg(a.partial_max + place), max, scale_log2);
      sum += weight * __ldcg(a.partial_sum + place);
      value += weight * __ldcg(a.partial_out + place * kHeadDim + dim);
    }
    store_column<Element>(a.problem, item, column, dim, value, max, sum);
  }
}

}  // namespace attnsieve::sm80
