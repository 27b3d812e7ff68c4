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

__device__ __forceinline__ void keep_and_add(float4& sum, float keep, float weight,
                                             const float4& x) {
  sum.x = fmaf(weight, x.x, keep * sum.x);
  sum.y = fmaf(weight, x.y, keep * sum.y);
  sum.z = fmaf(weight, x.z, keep * sum.z);
  sum.w = fmaf(weight, x.w, keep * sum.w);
}

// Leaves a warp's result in shared memory.
template <class Config>
__device__ void publish(const WarpResult<Config>& result, typename Config::Merge& merge) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
#pragma unroll
  for (int i = 0; i < 2 * Config::kColumnTiles; ++i) {
    float sum = result.softmax.row_sum[i];
#pragma unroll
    for (int distance = 4; distance < kWarpThreads; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    const int column = i / 2 * kTileColumns + lane % 4 * 2 + i % 2;
    if (lane < 4) {
      merge.max[column] = result.softmax.row_max[i];
      merge.sum[column] = sum;
    }
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        merge.out[column][Config::out_dim(step, half, lane / 4)] =
            result.out[step][i / 2][half * 2 + i % 2];
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

template <class Config>
__device__ __forceinline__ void store_part(const DecodeArguments& a, const DecodeItem& item,
                                           bool whole, int64_t slot, int column, int dim,
                                           const float4& value, float max, float sum) {
  if (whole) {
    store_column<typename Config::Element>(a.problem, item, column, dim, value, max, sum);
    return;
  }
  const int64_t place = slot * a.plan.columns + column;
  *reinterpret_cast<float4*>(a.partial_out + place * Config::kHeadDim + dim) = value;
  if (dim == 0) a.partial_state[place] = make_float2(max, sum);
}

// f(turn, column, dim, four dimensions, max, sum) for this thread's quads of dimensions of all columns
// of the chunk that the warps published.
template <class Config, class F>
__device__ __forceinline__ void for_each_merged(const DecodeArguments& a, const DecodeItem& item,
                                                const typename Config::Merge* merges, F&& f) {
  const float scale_log2 = logit_scale(a.problem, item.kv_head) * kLog2e;
#pragma unroll(Config::kMergesGroups ? Config::kMergeTurns : 1)
  for (int turn = 0; turn < Config::kMergeTurns; ++turn) {
    const int i = turn * kDecodeThreads + static_cast<int>(threadIdx.x);
    const int column = i / Config::kQuads;
    if (column >= item.columns) break;
    const int dim = i % Config::kQuads * 4;
    float max;
    float sum;
    const float4 value = merge_column<Config>(merges, column, dim, scale_log2, max, sum);
    f(turn, column, dim, value, max, sum);
  }
}

// Chunks of an item are merged in groups of as many in their order, then groups: the same bits
// whether one CTA had all of a group and left one result for it, or several left one for a chunk.
inline constexpr int kGroupChunks = 8;

// Of a chunk that another's result includes.
__device__ __forceinline__ float2 no_state() { return make_float2(negative_infinity(), 0.0f); }

// The chunks of a group so far, this thread's quads of dimensions of all columns.
template <class Config>
class ChunkGroup {
 public:
  __device__ void clear() {
#pragma unroll
    for (int turn = 0; turn < Config::kMergeTurns; ++turn) {
      value_[turn] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      max_[turn] = negative_infinity();
      sum_[turn] = 0.0f;
    }
  }

  __device__ void add(const DecodeArguments& a, const DecodeItem& item,
                      const typename Config::Merge* merges) {
    const float scale_log2 = logit_scale(a.problem, item.kv_head) * kLog2e;
    for_each_merged<Config>(a, item, merges,
                            [&](int turn, int, int, const float4& value, float max, float sum) {
                              if (max == negative_infinity()) return;
                              const float new_max = max_nan(max_[turn], max);
                              const float keep = part_weight(max_[turn], new_max, scale_log2);
                              const float weight = part_weight(max, new_max, scale_log2);
                              max_[turn] = new_max;
                              sum_[turn] = fmaf(weight, sum, keep * sum_[turn]);
                              keep_and_add(value_[turn], keep, weight, value);
                            });
  }

  // To the output where these are all keys of the item, else to `slot` of the workspace; the `others`
  // slots behind it are not read.
  __device__ void store(const DecodeArguments& a, const DecodeItem& item, bool whole, int64_t slot,
                        int others) const {
#pragma unroll
    for (int turn = 0; turn < Config::kMergeTurns; ++turn) {
      const int i = turn * kDecodeThreads + static_cast<int>(threadIdx.x);
      const int column = i / Config::kQuads;
      if (column >= item.columns) break;
      const int dim = i % Config::kQuads * 4;
      store_part<Config>(a, item, whole, slot, column, dim, value_[turn], max_[turn], sum_[turn]);
    }
    if (whole) return;
    for (int i = threadIdx.x; i < others * a.plan.columns; i += kDecodeThreads) {
      a.partial_state[(slot + 1) * a.plan.columns + i] = no_state();
    }
  }

 private:
  float4 value_[Config::kMergeTurns];
  float max_[Config::kMergeTurns];
  float sum_[Config::kMergeTurns];
};

// To the output where the item has no other chunk, else to the chunk's slot of the workspace.
template <class Config>
__device__ void merge_warps(const DecodeArguments& a, const DecodeItem& item, bool whole,
                            int64_t slot, const typename Config::Merge* merges) {
  for_each_merged<Config>(a, item, merges,
                          [&](int, int column, int dim, const float4& value, float max, float sum) {
                            store_part<Config>(a, item, whole, slot, column, dim, value, max, sum);
                          });
}

// To shared memory.
template <class Config>
__device__ void merge_warps(const DecodeArguments& a, const DecodeItem& item,
                            const typename Config::Merge* merges, PartResult<Config>& part) {
  for_each_merged<Config>(a, item, merges,
                          [&](int, int column, int dim, const float4& value, float max, float sum) {
                            *reinterpret_cast<float4*>(part.out[column] + dim) = value;
                            if (dim > 0) return;
                            part.max[column] = max;
                            part.sum[column] = sum;
                          });
}

// What the weights of an item's chunks need of shared memory.
template <class Config>
struct ChunkWeights {
  static constexpr int kGroups = kMaxDecodeSplits / kGroupChunks;
  // Of a chunk in its group: what those before it keep, and its own; negative if it is not there.
  float2 chunk[Config::kColumns][kMaxDecodeSplits];
  float group[Config::kColumns][kGroups];
  float max[Config::kColumns];
  float sum[Config::kColumns];
};

// Weights of the chunks of every column, a warp a column and eight lanes a group.
template <class Config>
__device__ void weigh_chunks(const DecodeArguments& a, const DecodeItem& item, int64_t first_slot,
                             int chunks, ChunkWeights<Config>& smem) {
  static_assert(kGroupChunks == 8);
  const float scale_log2 = logit_scale(a.problem, item.kv_head) * kLog2e;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  constexpr int kPerLane = kMaxDecodeSplits / kWarpThreads;
  for (int column = warp; column < item.columns; column += kDecodeWarps) {
    float group_max[kPerLane];
    float group_sum[kPerLane];
    float max = negative_infinity();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int chunk = i * kWarpThreads + lane;
      group_max[i] = negative_infinity();
      group_sum[i] = 0.0f;
      if (i * kWarpThreads >= chunks) continue;
      float2 state = no_state();
      if (chunk < chunks) {
        state = __ldcg(a.partial_state + (first_slot + chunk) * a.plan.columns + column);
      }
      float until = state.x;  // the maximum of the group's chunks up to this one
#pragma unroll
      for (int distance = 1; distance < kGroupChunks; distance *= 2) {
        const float before = __shfl_up_sync(0xffffffffu, until, distance, kGroupChunks);
        if (lane % kGroupChunks >= distance) until = max_nan(until, before);
      }
      float before = __shfl_up_sync(0xffffffffu, until, 1, kGroupChunks);
      if (lane % kGroupChunks == 0) before = negative_infinity();
      const float keep = part_weight(before, until, scale_log2);
      const float weight = part_weight(state.x, until, scale_log2);
      const bool exists = state.x != negative_infinity();
      smem.chunk[column][chunk] = make_float2(keep, exists ? weight : -1.0f);
#pragma unroll
      for (int j = 0; j < kGroupChunks; ++j) {
        const float kept = __shfl_sync(0xffffffffu, keep, j, kGroupChunks) * group_sum[i];
        const float sum = fmaf(__shfl_sync(0xffffffffu, weight, j, kGroupChunks),
                               __shfl_sync(0xffffffffu, state.y, j, kGroupChunks), kept);
        if (__shfl_sync(0xffffffffu, exists, j, kGroupChunks)) group_sum[i] = sum;
      }
      group_max[i] = __shfl_sync(0xffffffffu, until, kGroupChunks - 1, kGroupChunks);
      max = max_nan(max, group_max[i]);
    }
#pragma unroll
    for (int distance = kGroupChunks; distance < kWarpThreads; distance *= 2) {
      max = max_nan(max, __shfl_xor_sync(0xffffffffu, max, distance));
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float weight = part_weight(group_max[i], max, scale_log2);
      if (lane % kGroupChunks == 0) {
        smem.group[column][(i * kWarpThreads + lane) / kGroupChunks] = weight;
      }
      sum += weight * group_sum[i];
    }
#pragma unroll
    for (int distance = kGroupChunks; distance < kWarpThreads; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (lane == 0) {
      smem.max[column] = max;
      smem.sum[column] = sum;
    }
  }
}

// The results of an item's chunks, in their order whoever computed them. `all_exist`: no result
// stands for a group, and loads are under way before the weights are known: this is the tail of
// the kernel.
template <class Config>
__device__ void merge_chunks(const DecodeArguments& a, const DecodeItem& item, int64_t first_slot,
                             int chunks, bool all_exist, ChunkWeights<Config>& smem) {
  const int quads = item.columns * Config::kQuads;
  const int64_t stride = static_cast<int64_t>(a.plan.columns) * Config::kQuads;
  const auto* partials = reinterpret_cast<const float4*>(a.partial_out) + first_slot * stride;
  float4 ahead[kGroupChunks];
  const auto fetch = [&](int i, int first, auto&& exists) {
#pragma unroll
    for (int j = 0; j < kGroupChunks; ++j) {
      ahead[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (i < quads && first + j < chunks && exists(first + j)) {
        ahead[j] = __ldcg(partials + (first + j) * stride + i);
      }
    }
  };
  int i = static_cast<int>(threadIdx.x);
  // Read anew: what follows from these would be computed before the loop over chunks, and hold
  // registers throughout.
  asm volatile("" : "+r"(i), "+r"(chunks), "+l"(first_slot));
  if (all_exist) fetch(i, 0, [](int) { return true; });
  weigh_chunks<Config>(a, item, first_slot, chunks, smem);
  __syncthreads();
  for (; i < quads; i += kDecodeThreads) {
    const int column = i / Config::kQuads;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int first = 0; first < chunks; first += kGroupChunks) {
      if (!all_exist || first > 0 || i >= kDecodeThreads) {
        fetch(i, first, [&](int chunk) { return !(smem.chunk[column][chunk].y < 0.0f); });
      }
      float4 group = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int j = 0; j < kGroupChunks; ++j) {
        if (first + j >= chunks) continue;
        const float2 weight = smem.chunk[column][first + j];
        if (!(weight.y < 0.0f)) keep_and_add(group, weight.x, weight.y, ahead[j]);
      }
      add_scaled(value, smem.group[column][first / kGroupChunks], group);
    }
    store_column<typename Config::Element>(a.problem, item, column, i % Config::kQuads * 4, value,
                                           smem.max[column], smem.sum[column]);
  }
}

}  // namespace attnsieve::sm80
