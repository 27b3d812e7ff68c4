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

__device__ __forceinline__ void add_scaled(float4& sum, float weight, const float4& x) {
  sum.x = fmaf(weight, x.x, sum.x);
  sum.y = fmaf(weight, x.y, sum.y);
  sum.z = fmaf(weight, x.z, sum.z);
  sum.w = fmaf(weight, x.w, sum.w);
}

// Leaves a warp's result in shared memory.
template <class Config>
__device__ void publish(const DecodeWarp<Config>& warp, typename Config::Merge& merge) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
#pragma unroll
  for (int i = 0; i < 2 * Config::kColumnTiles; ++i) {
    float sum = warp.softmax.row_sum[i];
#pragma unroll
    for (int distance = 4; distance < kWarpThreads; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    const int column = i / 2 * kTileColumns + lane % 4 * 2 + i % 2;
    if (lane < 4) {
      merge.max[column] = warp.softmax.row_max[i];
      merge.sum[column] = sum;
    }
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        merge.out[column][Config::out_dim(step, half, lane / 4)] =
            warp.out[step][i / 2][half * 2 + i % 2];
      }
    }
  }
}

// Stores four dimensions of a column of an item: the state of all its keys, and the sink.
template <class Element>
__device__ __forceinline__ void store_column(const DecodeProblem& p, const DecodeItem& item,
                                             int column, int dim, const float4& value, float max,
                                             float sum) {
  const int row = item.row + column / item.heads;
  const int head = item.head + column % item.heads;
  const float sink = p.sink == nullptr ? negative_infinity() : p.sink[head];
  const RowResult result = finish_row(max, sum, logit_scale(p, item.kv_head), sink);
  auto* out = static_cast<Element*>(p.out.data) + item.batch * p.out.stride_batch +
              head * p.out.stride_head + row * p.out.stride_row;
  // A column that saw nothing holds zeros; its scale is 0.
  const float scale = p.v_scale == nullptr ? result.scale : result.scale * p.v_scale[item.kv_head];
  alignas(8) Element elements[4] = {
      static_cast<Element>(value.x * scale), static_cast<Element>(value.y * scale),
      static_cast<Element>(value.z * scale), static_cast<Element>(value.w * scale)};
  *reinterpret_cast<uint2*>(out + dim) = reinterpret_cast<const uint2&>(elements);
  if (dim == 0 && p.lse.data != nullptr) {
    p.lse
        .data[item.batch * p.lse.stride_batch + head * p.lse.stride_head + row * p.lse.stride_row] =
        result.lse;
  }
}

// Columns of a part of an item's keys, not normalised, relative to `max`, an unscaled logit.
template <class Config>
struct PartResult {
  alignas(16) float out[Config::kColumns][Config::kHeadDim];
  float max[Config::kColumns];
  float sum[Config::kColumns];
};

// The warps' results of a chunk for four dimensions of a column, in warp order.
template <class Config>
__device__ __forceinline__ float4 merge_column(const typename Config::Merge* merges, int column,
                                               int dim, float scale_log2, float& max, float& sum) {
  max = negative_infinity();
#pragma unroll
  for (int warp = 0; warp < kDecodeWarps; ++warp) {
    max = max_nan(max, merges[warp].max[column]);
  }
  sum = 0.0f;
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int warp = 0; warp < kDecodeWarps; ++warp) {
    const float weight = part_weight(merges[warp].max[column], max, scale_log2);
    sum += weight * merges[warp].sum[column];
    add_scaled(value, weight, *reinterpret_cast<const float4*>(merges[warp].out[column] + dim));
  }
  return value;
}

// f(column, dim, four dimensions, max, sum) for all columns of the chunk that the warps published.
template <class Config, class F>
__device__ __forceinline__ void for_each_merged(const DecodeArguments& a, const DecodeItem& item,
                                                const typename Config::Merge* merges, F&& f) {
  constexpr int kQuads = Config::kHeadDim / 4;  // of dimensions
  const float scale_log2 = logit_scale(a.problem, item.kv_head) * kLog2e;
  for (int i = threadIdx.x; i < item.columns * kQuads; i += kDecodeThreads) {
    const int column = i / kQuads;
    const int dim = i % kQuads * 4;
    float max;
    float sum;
    const float4 value = merge_column<Config>(merges, column, dim, scale_log2, max, sum);
    f(column, dim, value, max, sum);
  }
}

// To the output where the item has no other chunk, else to the chunk's place in the workspace.
template <class Config>
__device__ void merge_warps(const DecodeArguments& a, const DecodeItem& item, int64_t slot,
                            bool whole, const typename Config::Merge* merges) {
  for_each_merged<Config>(
      a, item, merges, [&](int column, int dim, const float4& value, float max, float sum) {
        if (whole) {
          store_column<typename Config::Element>(a.problem, item, column, dim, value, max, sum);
          return;
        }
        const int64_t place = slot * a.plan.columns + column;
        *reinterpret_cast<float4*>(a.partial_out + place * Config::kHeadDim + dim) = value;
        if (dim == 0) a.partial_state[place] = make_float2(max, sum);
      });
}

// To shared memory.
template <class Config>
__device__ void merge_warps(const DecodeArguments& a, const DecodeItem& item,
                            const typename Config::Merge* merges, PartResult<Config>& part) {
  for_each_merged<Config>(a, item, merges,
                          [&](int column, int dim, const float4& value, float max, float sum) {
                            *reinterpret_cast<float4*>(part.out[column] + dim) = value;
                            if (dim > 0) return;
                            part.max[column] = max;
                            part.sum[column] = sum;
                          });
}

// What the weights of an item's chunks need of shared memory.
template <class Config>
struct ChunkWeights {
  float weight[Config::kColumns][kMaxDecodeSplits];
  float max[Config::kColumns];
  float sum[Config::kColumns];
};

// Weights of the chunks of every column, a warp a column.
template <class Config>
__device__ void weigh_chunks(const DecodeArguments& a, const DecodeItem& item, int64_t first_slot,
                             int chunks, ChunkWeights<Config>& smem) {
  const float scale_log2 = logit_scale(a.problem, item.kv_head) * kLog2e;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  constexpr int kPerLane = kMaxDecodeSplits / kWarpThreads;
  for (int column = warp; column < item.columns; column += kDecodeWarps) {
    float2 state[kPerLane];
    float max = negative_infinity();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int chunk = i * kWarpThreads + lane;
      state[i] = make_float2(negative_infinity(), 0.0f);
      if (chunk < chunks) {
        state[i] = __ldcg(a.partial_state + (first_slot + chunk) * a.plan.columns + column);
      }
      max = max_nan(max, state[i].x);
    }
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      max = max_nan(max, __shfl_xor_sync(0xffffffffu, max, distance));
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float weight = part_weight(state[i].x, max, scale_log2);
      smem.weight[column][i * kWarpThreads + lane] = weight;
      sum += weight * state[i].y;
    }
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (lane == 0) {
      smem.max[column] = max;
      smem.sum[column] = sum;
    }
  }
}

// The chunks' results of an item, in their order whoever computed them. Many loads are under way
// before the weights are known: this is the tail of the kernel.
template <class Config>
__device__ void merge_chunks(const DecodeArguments& a, const DecodeItem& item, int64_t first_slot,
                             int chunks, ChunkWeights<Config>& smem) {
  constexpr int kQuads = Config::kHeadDim / 4;
  constexpr int kAhead = 16;
  const int quads = item.columns * kQuads;
  const int64_t stride = static_cast<int64_t>(a.plan.columns) * kQuads;
  const auto* partials = reinterpret_cast<const float4*>(a.partial_out) + first_slot * stride;
  float4 ahead[kAhead];
  const auto fetch = [&](int i, int chunk) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      ahead[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (i < quads && chunk + j < chunks) ahead[j] = __ldcg(partials + (chunk + j) * stride + i);
    }
  };
  int i = static_cast<int>(threadIdx.x);
  fetch(i, 0);
  weigh_chunks<Config>(a, item, first_slot, chunks, smem);
  __syncthreads();
  for (; i < quads; i += kDecodeThreads) {
    const int column = i / kQuads;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int chunk = 0; chunk < chunks; chunk += kAhead) {
      if (chunk > 0 || i >= kDecodeThreads) fetch(i, chunk);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (chunk + j < chunks) add_scaled(value, smem.weight[column][chunk + j], ahead[j]);
      }
    }
    store_column<typename Config::Element>(a.problem, item, column, i % kQuads * 4, value,
                                           smem.max[column], smem.sum[column]);
  }
}

}  // namespace attnsieve::sm80
