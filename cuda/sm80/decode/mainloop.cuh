// One warp's share of a chunk: S^T = K Q^T -> mask -> online softmax -> O^T += V^T P^T, 16 keys at a
// time. Keys, then head dimensions, are the MMA's M, so that few query vectors waste little of it, and
// O has the softmax statistics of its columns in the same lanes.
#pragma once

#include "cuda/common/ptx_sm80.cuh"
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
class DecodeWarp {
  using Element = typename Config::Element;
  using Stored = typename Config::Stored;
  using Stage = typename Config::Stage;
  static constexpr int kSteps = Config::kSteps;
  static constexpr int kColumnTiles = Config::kColumnTiles;
  static constexpr int kStride = kDecodeWarps * kTileKeys;

 public:
  __device__ DecodeWarp(const DecodeArguments& a, typename Config::Stages& smem)
      : a_(a), smem_(smem), lane_(static_cast<int>(threadIdx.x) % kWarpThreads) {}

  // Starts the loads for slots [begin, end) of a task's walk, this warp's tiles of 16 among those of
  // the CTA. A task of another item lies at another address.
  __device__ void start(const DecodeTask& task, int begin, int end) {
    const bool new_item = task_ != &task;
    task_ = &task;
    begin_ = begin + static_cast<int>(threadIdx.x) / kWarpThreads * kTileKeys;
    end_ = end;
    const KeyPlace first = place_in(begin_);
    const KeyPlace second = place_in(begin_ + kStride);
    if (new_item) load_queries();
    load(smem_.stage[0], first);
    load(smem_.stage[1], second);
    next_ = place_in(begin_ + 2 * kStride);
  }

  // Attends to the slots that were started.
  __device__ void run(WarpResult<Config>& result) {
    int stage = 0;
    for (int slot = begin_; slot < end_; slot += kStride) {
      cp_async_wait<kDecodeStages - 1>();
      __syncwarp();
      attend(smem_.stage[stage], result);
      __syncwarp();
      load(smem_.stage[stage], next_);
      next_ = place_in(slot + 3 * kStride);
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

  // Of this lane's key, lane % 16 of a tile.
  __device__ KeyPlace place_in(int tile_slot) const {
    const int slot = tile_slot + lane_ % kTileKeys;
    if (slot >= end_) return {0, 0, KeyPlace::kNowhere};
    return place_of(a_, *task_, slot);
  }

  // Starts the copies of a tile; keys that do not exist become zeros. The lower lanes know where the
  // rows of K are, the upper where those of V are.
  __device__ void load(Stage& stage, const KeyPlace& place) {
    if (lane_ < kTileKeys) stage.position[lane_] = place.position;
    const bool exists = place.position != KeyPlace::kNowhere;
    const uint32_t mask = __ballot_sync(0xffffffffu, exists);
    const KeySource& source = lane_ < kTileKeys ? task_->k : task_->v;
    const auto* row_start = static_cast<const Stored*>(source.data);
    if (exists) row_start += place.outer * source.stride_outer + place.row * source.stride_row;
    const auto address = reinterpret_cast<unsigned long long>(row_start);
    constexpr int kPassRows = kWarpThreads / Config::kRowChunks;
    const int chunk = lane_ % Config::kRowChunks;
#pragma unroll 4  // the addresses of all passes at once would need too many registers
    for (int pass = 0; pass < kTileKeys / kPassRows; ++pass) {
      const int row = pass * kPassRows + lane_ / Config::kRowChunks;
      const int offset = Config::offset(row, chunk);
      const bool row_exists = mask >> row & 1u;
      const auto k = __shfl_sync(0xffffffffu, address, row) + chunk * 16;
      const auto v = __shfl_sync(0xffffffffu, address, kTileKeys + row) + chunk * 16;
      cp_async_16_or_zero(stage.k + offset, reinterpret_cast<const void*>(k), row_exists);
      cp_async_16_or_zero(stage.v + offset, reinterpret_cast<const void*>(v), row_exists);
    }
    cp_async_commit();
  }

  __device__ void attend(Stage& stage, WarpResult<Config>& result) {
    auto& [out, softmax] = result;
    float scores[kColumnTiles][4] = {};  // rows lane / 4 and + 8, columns as in `softmax`
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t keys[4];
      load_keys<Config>(stage.k, step, lane_, keys);
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        decode_mma<Element>(scores[tile], keys, query_[step][tile]);
      }
    }
    const int positions[2] = {stage.position[lane_ / 4], stage.position[lane_ / 4 + 8]};
    bool mixed = false;  // some column sees a key that another does not
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
    rescale(scores, result);
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
    if (__any_sync(0xffffffffu, mixed)) isolate(stage, scores, result);
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
      load_values<Config>(stage.v, step, lane_, values);
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        decode_mma<Element>(out[step][tile], values, weights[tile]);
      }
    }
  }

  // Takes new maxima into the state where a score leaves the old one too far behind. Each column for
  // itself: what one sees does not change another's bits.
  __device__ void rescale(const float (&scores)[kColumnTiles][4], WarpResult<Config>& result) {
    auto& [out, softmax] = result;
    bool behind = false;
    float maxima[2 * kColumnTiles];
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
      maxima[i] = max_nan(scores[i / 2][i % 2], scores[i / 2][i % 2 + 2]);
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

  // 0 * NaN would carry a value that is not finite into columns that do not see its key: such values
  // are added to those that do, and are zero for the MMA.
  __device__ void isolate(Stage& stage, const float (&weights)[kColumnTiles][4],
                          WarpResult<Config>& result) {
    auto* const scratch = reinterpret_cast<float*>(stage.k);  // [16 keys][columns]; K was used
    static_assert(sizeof(stage.k) >= kTileKeys * Config::kColumns * sizeof(float));
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
        const int dim = Config::out_dim(i / 2, i % 2, lane_ / 4);
        Stored& stored = stage.v[Config::offset(key, dim / Config::kChunkElements) +
                                 dim % Config::kChunkElements];
        const float value = static_cast<float>(stored);
        __syncwarp();
        if (isfinite(value)) continue;
        if (lane_ % 4 == 0) stored = static_cast<Stored>(0.0f);
#pragma unroll
        for (int column = 0; column < 2 * kColumnTiles; ++column) {
          if (position > limit_[column]) continue;
          const float weight = scratch[key * Config::kColumns + column_of(column / 2, column % 2)];
          result.out[i / 2][column / 2][i % 2 * 2 + column % 2] += weight * value;
        }
      }
    }
    __syncwarp();
  }

  const DecodeArguments& a_;
  typename Config::Stages& smem_;
  int lane_;
  const DecodeTask* task_ = nullptr;
  int begin_;  // slots
  int end_;
  KeyPlace next_;  // of the tile behind those under way
  float scale_log2_;
  float slack_;  // kRescaleLog2 in unscaled logits
  uint32_t query_[kSteps][kColumnTiles][2];
  int limit_[2 * kColumnTiles];
};

}  // namespace attnsieve::sm80
