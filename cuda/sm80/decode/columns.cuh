// The query vectors of an item as a warp holds them: columns of Q^T, which keys they see, and what
// depends on their scale. Base of the warps that attend.
#pragma once

#include "cuda/common/softmax.cuh"
#include "cuda/sm80/decode/fragments.cuh"
#include "cuda/sm80/decode/walk.cuh"

namespace attnsieve::sm80 {

// The maximum may fall behind by this factor (of 2) before sums and output are rescaled.
inline constexpr float kRescaleLog2 = 6.0f;

// Logits are softmax_scale times q . k, where k may be codes.
__device__ __forceinline__ float logit_scale(const DecodeProblem& p, int kv_head) {
  return p.k_scale == nullptr ? p.softmax_scale : p.softmax_scale * p.k_scale[kv_head];
}

// Of the keys that a warp attended to.
template <class Config>
struct WarpResult {
  float out[Config::kSteps][Config::kColumnTiles][4] =
      {};  // [16 dimensions][8 columns], accumulators
  OnlineSoftmax<2 * Config::kColumnTiles> softmax;  // columns 8 i + 2 (lane % 4), + 1
};

template <class Config>
class DecodeColumns {
 protected:
  using Element = typename Config::Element;
  using Stored = typename Config::Stored;
  static constexpr int kSteps = Config::kSteps;
  static constexpr int kColumnTiles = Config::kColumnTiles;
  using Scores = float[kColumnTiles][4];  // of 16 keys: rows lane / 4 and + 8, columns of a softmax
  using Rounded = uint32_t[kColumnTiles][2];  // the same as pairs of elements

  __device__ explicit DecodeColumns(const DecodeArguments& a)
      : a_(a), lane_(static_cast<int>(threadIdx.x) % kWarpThreads) {}

  __device__ int column_of(int tile, int half) const {
    return tile * kTileColumns + lane_ % 4 * 2 + half;
  }

  static constexpr int kNoColumn = -0x7fffffff - 1;
  // The last position that a column sees; negative where it sees none.
  __device__ int limit_of(int column) const {
    if (column >= task_->item.columns) return kNoColumn;
    if (!a_.problem.causal) return KeyPlace::kNowhere - 1;
    const int row = task_->item.row + column / task_->item.heads;
    return task_->length - static_cast<int>(a_.problem.seqlen_q) + row;
  }

  // B operands of S^T, columns of Q^T, and what else depends on the item.
  __device__ void load_queries() {
    scale_log2_ = logit_scale(a_.problem, task_->item.kv_head) * kLog2e;
    slack_ = kRescaleLog2 / scale_log2_;
    const HeadTensor& q = a_.problem.q;
    const DecodeItem& item = task_->item;
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const int column = tile * kTileColumns + lane_ / 4;
      const bool exists = column < item.columns;
      const int row = item.row + column / item.heads;
      const int head = item.head + column % item.heads;
      const auto* source = static_cast<const Element*>(q.data) + item.batch * q.stride_batch +
                           head * q.stride_head + row * q.stride_row;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto* pair = source + Config::query_dim(step, half, lane_ % 4);
          query_[step][tile][half] = exists ? *reinterpret_cast<const uint32_t*>(pair) : 0u;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) limit_[i] = limit_of(column_of(i / 2, i % 2));
  }

  // S^T = K Q^T of 16 keys.
  __device__ void score(const Stored* keys, Scores& scores) const {
    // Two chains where registers allow, so that an MMA does not wait for the one before.
    constexpr bool kTwoChains = kColumnTiles == 1;
    Scores odd = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t rows[4];
      load_keys<Config>(keys, step, lane_, rows);
      Scores& chain = kTwoChains && step % 2 != 0 ? odd : scores;
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        decode_mma<Element>(chain[tile], rows, query_[step][tile]);
      }
    }
    if constexpr (kTwoChains) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][i] += odd[0][i];
    }
  }

  // Masks the scores of keys that a column does not see. Whether some column sees a key that another
  // does not.
  __device__ bool mask(const int* key_positions, Scores& scores) const {
    const int positions[2] = {key_positions[lane_ / 4], key_positions[lane_ / 4 + 8]};
    bool mixed = false;
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int limit = limit_[2 * tile + i % 2];
        const bool sees = positions[i / 2] <= limit;
        mixed |= !sees && positions[i / 2] != KeyPlace::kNowhere && limit != kNoColumn;
        if (!sees) scores[tile][i] = negative_infinity();
      }
    }
    return mixed;
  }

  // Takes new maxima into the state where one leaves the old too far behind. Each column for itself:
  // what one sees does not change another's bits. `maxima` are of this lane's keys, or of all lanes'.
  __device__ void rescale(float (&maxima)[2 * kColumnTiles], WarpResult<Config>& result) const {
    auto& [out, softmax] = result;
    bool behind = false;
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
      behind |= !(maxima[i] <= softmax.row_max[i] + slack_);
    }
    if (!__any_sync(0xffffffffu, behind)) return;
    float factors[2 * kColumnTiles];
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
#pragma unroll
      for (int distance = 4; distance < kWarpThreads; distance *= 2) {
        maxima[i] = max_nan(maxima[i], __shfl_xor_sync(0xffffffffu, maxima[i], distance));
      }
      if (maxima[i] <= softmax.row_max[i] + slack_) maxima[i] = negative_infinity();
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

  // Scores become weights, whose sums enter the state.
  __device__ void weigh(Scores& scores, OnlineSoftmax<2 * kColumnTiles>& softmax) const {
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
  }

  static __device__ void round(const Scores& weights, Rounded& rounded) {
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Element pair[2] = {static_cast<Element>(weights[tile][half * 2]),
                           static_cast<Element>(weights[tile][half * 2 + 1])};
        rounded[tile][half] = reinterpret_cast<const uint32_t&>(pair);
      }
    }
  }

  // O^T += V^T P^T over 16 keys.
  __device__ void accumulate(const Stored* values, const Rounded& weights,
                             WarpResult<Config>& result) const {
    uint32_t operands[kColumnTiles][2];
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        operands[tile][half] = transpose_8x8(weights[tile][half]);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t columns[4];
      load_values<Config>(values, step, lane_, columns);
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        decode_mma<Element>(result.out[step][tile], columns, operands[tile]);
      }
    }
  }

  // 0 * NaN would carry a value that is not finite into columns that do not see its key: such values
  // are added to those that do, and are zero for the MMA.
  __device__ void isolate(const int* key_positions, Stored* values, const Scores& weights,
                          WarpResult<Config>& result) const {
    for (int key = 0; key < kTileKeys; ++key) {
      const int position = key_positions[key];
      float own[2 * kColumnTiles];  // the key's weights in this lane's columns
#pragma unroll
      for (int i = 0; i < 2 * kColumnTiles; ++i) {
        const float weight = key < 8 ? weights[i / 2][i % 2] : weights[i / 2][2 + i % 2];
        own[i] = __shfl_sync(0xffffffffu, weight, key % 8 * 4 + lane_ % 4);
      }
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const int dim = Config::out_dim(i / 2, i % 2, lane_ / 4);
        Stored& stored = values[Config::offset(key, dim / Config::kChunkElements) +
                                dim % Config::kChunkElements];
        const float value = static_cast<float>(stored);
        __syncwarp();
        if (isfinite(value)) continue;
        if (lane_ % 4 == 0) stored = static_cast<Stored>(0.0f);
#pragma unroll
        for (int column = 0; column < 2 * kColumnTiles; ++column) {
          if (position > limit_[column]) continue;
          result.out[i / 2][column / 2][i % 2 * 2 + column % 2] += own[column] * value;
        }
      }
    }
    __syncwarp();
  }

  const DecodeArguments& a_;
  int lane_;
  const DecodeTask* task_ = nullptr;
  float scale_log2_;
  float slack_;  // kRescaleLog2 in unscaled logits
  uint32_t query_[kSteps][kColumnTiles][2];
  int limit_[2 * kColumnTiles];
};

}  // namespace attnsieve::sm80
