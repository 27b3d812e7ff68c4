// One warp's share of a chunk: S^T = K Q^T -> mask -> online softmax -> O^T += V^T P^T, 16 keys at a
// time. Keys, then head dimensions, are the MMA's M, so that few query vectors waste little of it, and
// O has the softmax statistics of its columns in the same lanes.
#pragma once

#include "cuda/common/ptx_sm80.cuh"
#include "cuda/sm80/decode/columns.cuh"

namespace attnsieve::sm80 {

// Passes of a load whose addresses are formed together: more would need too many registers, which
// before sm_90 the widest output of float8 caches has fewer of.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int kAddressesAtOnce = 2;
#else
inline constexpr int kAddressesAtOnce = 4;
#endif

template <class Config>
class DecodeWarp : DecodeColumns<Config> {
  using Base = DecodeColumns<Config>;
  using Stored = typename Config::Stored;
  using Stage = typename Config::Stage;
  using Base::a_, Base::lane_, Base::task_;
  static constexpr int kStride = kDecodeWarps * kTileKeys;

 public:
  __device__ DecodeWarp(const DecodeArguments& a, typename Config::Stages& smem)
      : Base(a), smem_(smem) {}

  // Starts the loads for slots [begin, end) of a task's walk, this warp's tiles of 16 among those of
  // the CTA. A task of another item lies at another address.
  __device__ void start(const DecodeTask& task, int begin, int end) {
    const bool new_item = task_ != &task;
    task_ = &task;
    begin_ = begin + static_cast<int>(threadIdx.x) / kWarpThreads * kTileKeys;
    end_ = end;
    const KeyPlace first = place_in(begin_);
    const KeyPlace second = place_in(begin_ + kStride);
    if (new_item) Base::load_queries();
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
#pragma unroll(kAddressesAtOnce)
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
    typename Base::Scores scores = {};
    Base::score(stage.k, scores);
    const bool mixed = Base::mask(stage.position, scores);
    float maxima[2 * Config::kColumnTiles];
#pragma unroll
    for (int i = 0; i < 2 * Config::kColumnTiles; ++i) {
      maxima[i] = max_nan(scores[i / 2][i % 2], scores[i / 2][i % 2 + 2]);
    }
    Base::rescale(maxima, result);
    Base::weigh(scores, result.softmax);
    if (__any_sync(0xffffffffu, mixed)) {
      Base::isolate(stage.position, stage.v, scores, result);
    }
    typename Base::Rounded weights;
    Base::round(scores, weights);
    Base::accumulate(stage.v, weights, result);
  }

  typename Config::Stages& smem_;
  int begin_;  // slots
  int end_;
  KeyPlace next_;  // of the tile behind those under way
};

}  // namespace attnsieve::sm80
