// One warp's share of a chunk: S^T = K Q^T -> mask -> online softmax -> O^T += V^T P^T, 16 keys at a
// time. Keys, then head dimensions, are the MMA's M, so that few query vectors waste little of it, and
// O has the softmax statistics of its columns in the same lanes.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/numeric/numeric_types.hpp>

#include "cuda/common/ptx_sm80.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/sm80/decode/walk.cuh"

namespace attnsieve::sm80 {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpThreads;
inline constexpr int kDecodeStages = 2;
inline constexpr int kTileKeys = 16;
inline constexpr int kTileColumns = 8;

// The maximum may fall behind by this factor (of 2) before sums and output are rescaled.
inline constexpr float kRescaleLog2 = 6.0f;

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t matrix) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

template <class Element, int kHeadDim_, int kColumnTiles_>
struct DecodeConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kColumnTiles = kColumnTiles_;  // of 8 query vectors
  static constexpr int kColumns = kColumnTiles * kTileColumns;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kRowChunks = kHeadDim / 8;  // of 16 bytes

  struct Stage {
    alignas(128) Element k[kTileKeys * kHeadDim];
    alignas(128) Element v[kTileKeys * kHeadDim];
    int position[kTileKeys];
  };
  struct Merge {
    float out[kColumns][kHeadDim];
    float max[kColumns];
    float sum[kColumns];
  };
  union WarpStorage {
    Stage stages[kDecodeStages];
    Merge merge;
  };

  using Mma = std::conditional_t<std::is_same_v<Element, cute::bfloat16_t>,
                                 cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                 cute::SM80_16x8x16_F32F16F16F32_TN>;
  // Element offset of a 16-byte chunk in a tile: conflict-free for cp.async and ldmatrix.
  static __device__ int offset(int row, int chunk) {
    return row * kHeadDim + (chunk ^ row % 8) * 8;
  }
};

template <class Element, int kHeadDim, int kColumnTiles>
class DecodeWarp {
  using Config = DecodeConfig<Element, kHeadDim, kColumnTiles>;
  using Stage = typename Config::Stage;
  static constexpr int kSteps = Config::kSteps;

 public:
  float out[kSteps][kColumnTiles][4];  // [16 dimensions][8 columns] as MMA accumulators
  OnlineSoftmax<2 * kColumnTiles> softmax;  // columns 8 i + 2 (lane % 4), + 1

  __device__ DecodeWarp(const DecodeArguments& a, const DecodeItem& item, const DecodeWalk& walk,
                        typename Config::WarpStorage& smem)
      : a_(a),
        item_(item),
        walk_(walk),
        smem_(smem),
        lane_(static_cast<int>(threadIdx.x) % kWarpThreads),
        scale_log2_(a.problem.softmax_scale * kLog2e) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[step][tile][i] = 0.0f;
      }
    }
    load_queries();
  }

  // Slots [begin, end) of the walk, this warp's tiles of 16 among those of the CTA.
  __device__ void run(int64_t begin, int64_t end) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    begin += warp * kTileKeys;
    constexpr int kStride = kDecodeWarps * kTileKeys;
    KeyPlace place = place_of(begin, end);
    load(0, place);
    place = place_of(begin + kStride, end);
    int stage = 0;
    for (int64_t slot = begin; slot < end; slot += kStride) {
      load(stage ^ 1, place);
      place = place_of(slot + 2 * kStride, end);
      cp_async_wait<1>();
      __syncwarp();
      attend(smem_.stages[stage]);
      __syncwarp();
      stage ^= 1;
    }
    cp_async_wait<0>();
    __syncwarp();
  }

 private:
  __device__ int column_of(int tile, int half) const {
    return tile * kTileColumns + lane_ % 4 * 2 + half;
  }

  static constexpr int kNoColumn = -0x7fffffff - 1;
  // The last position that a column sees; negative where it sees none.
  __device__ int limit_of(int column) const {
    if (column >= item_.heads * a_.plan.rows) return kNoColumn;
    if (!a_.problem.causal) return KeyPlace::kNowhere - 1;
    const int row = item_.row + column / item_.heads;
    return static_cast<int>(walk_.length() - a_.problem.seqlen_q) + row;
  }

  // B operands of S^T: columns of Q^T.
  __device__ void load_queries() {
    const DecodeProblem& p = a_.problem;
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const int column = tile * kTileColumns + lane_ / 4;
      const bool exists = column < item_.heads * a_.plan.rows;
      const int row = item_.row + column / item_.heads;
      const int head = item_.head + column % item_.heads;
      const auto* q = static_cast<const Element*>(p.q.data) + item_.batch * p.q.stride_batch +
                      head * p.q.stride_head + row * p.q.stride_row + lane_ % 4 * 2;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          query_[step][tile][half] =
              exists ? *reinterpret_cast<const uint32_t*>(q + step * 16 + half * 8) : 0u;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) limit_[i] = limit_of(column_of(i / 2, i % 2));
  }

  // Of this lane's key, lane % 16 of a tile.
  __device__ KeyPlace place_of(int64_t tile_slot, int64_t end) const {
    const int64_t slot = tile_slot + lane_ % kTileKeys;
    if (slot >= end) return {0, 0, KeyPlace::kNowhere};
    return walk_.at(slot);
  }

  // Starts the copies of a tile; keys that do not exist become zeros.
  __device__ void load(int stage_index, const KeyPlace& place) {
    const DecodeProblem& p = a_.problem;
    Stage& stage = smem_.stages[stage_index];
    if (lane_ < kTileKeys) stage.position[lane_] = place.position;
    const int64_t k_row = place.outer * p.k.stride_batch + item_.kv_head * p.k.stride_head +
                          place.row * p.k.stride_row;
    const int64_t v_row = place.outer * p.v.stride_batch + item_.kv_head * p.v.stride_head +
                          place.row * p.v.stride_row;
    constexpr int kPassRows = kWarpThreads / Config::kRowChunks;
    const int chunk = lane_ % Config::kRowChunks;
#pragma unroll
    for (int pass = 0; pass < kTileKeys / kPassRows; ++pass) {
      const int row = pass * kPassRows + lane_ / Config::kRowChunks;
      const bool exists =
          __shfl_sync(0xffffffffu, place.position, row) != KeyPlace::kNowhere;
      const int64_t k_offset = __shfl_sync(0xffffffffu, k_row, row) + chunk * 8;
      const int64_t v_offset = __shfl_sync(0xffffffffu, v_row, row) + chunk * 8;
      cp_async_16_or_zero(stage.k + Config::offset(row, chunk),
                          static_cast<const Element*>(p.k.data) + (exists ? k_offset : 0), exists);
      cp_async_16_or_zero(stage.v + Config::offset(row, chunk),
                          static_cast<const Element*>(p.v.data) + (exists ? v_offset : 0), exists);
    }
    cp_async_commit();
  }

  static __device__ void fma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Config::Mma::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2],
                     d[3]);
  }

  __device__ void attend(Stage& stage) {
    float scores[kColumnTiles][4] = {};  // rows lane / 4 and + 8, columns as in `softmax`
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t keys[4];
      const int row = lane_ % 16;
      const auto* source = stage.k + Config::offset(row, step * 2 + lane_ / 16);
      cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(source), keys[0],
                                    keys[1], keys[2], keys[3]);
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        fma(scores[tile], keys, query_[step][tile][0], query_[step][tile][1]);
      }
    }
    const int positions[2] = {stage.position[lane_ / 4], stage.position[lane_ / 4 + 8]};
    bool mixed = false;  // some column sees a key that another does not
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool sees = positions[i / 2] <= limit_[2 * tile + i % 2];
        mixed |= !sees && positions[i / 2] != KeyPlace::kNowhere && limit_[2 * tile + i % 2] != kNoColumn;
        if (!sees) scores[tile][i] = negative_infinity();
      }
    }
    rescale(scores);
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 2 * tile + i % 2;
        const float row_max = softmax.row_max[column];
        const float base = row_max == negative_infinity() ? 0.0f : base_of(row_max, scale_log2_);
        scores[tile][i] = exp2_approx(fmaf(scores[tile][i], scale_log2_, -base));
        softmax.row_sum[column] += scores[tile][i];
      }
    }
    if (__any_sync(0xffffffffu, mixed)) isolate(stage, scores);
    uint32_t weights[kColumnTiles][2];
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Element pair[2] = {static_cast<Element>(scores[tile][half * 2]),
                           static_cast<Element>(scores[tile][half * 2 + 1])};
        weights[tile][half] = transpose_8x8(reinterpret_cast<const uint32_t&>(pair));
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t values[4];
      const int row = lane_ % 8 + lane_ / 16 * 8;
      const auto* source = stage.v + Config::offset(row, step * 2 + lane_ / 8 % 2);
      cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(source), values[0],
                                    values[1], values[2], values[3]);
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        fma(out[step][tile], values, weights[tile][0], weights[tile][1]);
      }
    }
  }

  // Takes new maxima into the state where a score leaves the old one too far behind.
  __device__ void rescale(const float (&scores)[kColumnTiles][4]) {
    const float slack = kRescaleLog2 / scale_log2_;
    bool behind = false;
    float maxima[2 * kColumnTiles];
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
      maxima[i] = max_nan(scores[i / 2][i % 2], scores[i / 2][i % 2 + 2]);
      behind |= !(maxima[i] <= softmax.row_max[i] + slack);
    }
    if (!__any_sync(0xffffffffu, behind)) return;
    float factors[2 * kColumnTiles];
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
#pragma unroll
      for (int distance = 4; distance < kWarpThreads; distance *= 2) {
        maxima[i] = max_nan(maxima[i], __shfl_xor_sync(0xffffffffu, maxima[i], distance));
      }
      factors[i] = softmax.begin(i, maxima[i], scale_log2_).rescale;
      softmax.row_sum[i] *= factors[i];
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[step][tile][i] *= factors[2 * tile + i % 2];
      }
    }
  }

  // 0 * NaN would carry a value that is not finite into columns that do not see its key: such values
  // are added to those that do, and are zero for the MMA.
  __device__ void isolate(Stage& stage, const float (&weights)[kColumnTiles][4]) {
    auto* const scratch = reinterpret_cast<float*>(stage.k);  // [16 keys][columns]; K was used
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scratch[(lane_ / 4 + i / 2 * 8) * Config::kColumns + column_of(tile, i % 2)] =
            weights[tile][i];
      }
    }
    __syncwarp();
    for (int key = 0; key < kTileKeys; ++key) {
      const int position = stage.position[key];
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const int dim = i / 2 * 16 + i % 2 * 8 + lane_ / 4;
        Element& element = stage.v[Config::offset(key, dim / 8) + dim % 8];
        const float value = static_cast<float>(element);
        __syncwarp();
        if (isfinite(value)) continue;
        if (lane_ % 4 == 0) element = Element(0.0f);
#pragma unroll
        for (int column = 0; column < 2 * kColumnTiles; ++column) {
          if (position > limit_[column]) continue;
          const float weight =
              scratch[key * Config::kColumns + column_of(column / 2, column % 2)];
          out[i / 2][column / 2][i % 2 * 2 + column % 2] += weight * value;
        }
      }
    }
    __syncwarp();
  }

  const DecodeArguments& a_;
  const DecodeItem& item_;
  const DecodeWalk& walk_;
  typename Config::WarpStorage& smem_;
  int lane_;
  float scale_log2_;
  uint32_t query_[kSteps][kColumnTiles][2];
  int limit_[2 * kColumnTiles];
};

}  // namespace attnsieve::sm80
