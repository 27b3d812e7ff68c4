// One warp's visiting sequence: scores of a tile, a vote of all columns, and only for a kept tile its
// values. Keys of the next tile are on their way meanwhile.
#pragma once

#include "cuda/common/ptx_sm80.cuh"
#include "cuda/common/skip_policy.cuh"
#include "cuda/sm80/decode/columns.cuh"

namespace attnsieve::sm80 {

inline constexpr int kMaxTileSteps = 128 / kTileKeys;  // of the widest skip_block

template <class Config>
struct ThresholdStages {
  using Stored = typename Config::Stored;
  using Rows = Stored[kTileKeys * Config::kHeadDim];
  // Scores of a tile wait for the vote in registers, or here where the output leaves none.
  static constexpr bool kParksScores = Config::kColumnTiles > 1;
  static constexpr int kStages = kParksScores ? 2 : 3;  // of keys, and of values
  static constexpr int kStepScores = Config::kColumnTiles * 4;  // of a lane

  alignas(128) Rows keys[kStages];
  alignas(128) Rows values[kStages];
  float scores[kParksScores ? kMaxTileSteps * kStepScores : 1][kWarpThreads];
  int key_positions[kStages][kTileKeys];
  int value_positions[kStages][kTileKeys];
  float vote_max[Config::kColumns];  // over the tiles kept so far
};

template <class Config>
class ThresholdWarp : DecodeColumns<Config> {
  using Base = DecodeColumns<Config>;
  using Stored = typename Config::Stored;
  using Stages = ThresholdStages<Config>;
  using Scores = typename Base::Scores;
  static constexpr bool kParks = Stages::kParksScores;
  static constexpr int kStages = Stages::kStages;
  using Base::a_, Base::lane_, Base::task_, Base::limit_, Base::scale_log2_;
  static constexpr int kColumnTiles = Config::kColumnTiles;
  static constexpr int kLaneColumns = 2 * kColumnTiles;

 public:
  // Visits are counted in the order of the semantics: the last tile, then the others ascending.
  // `log2_lambda` of the item's columns.
  __device__ ThresholdWarp(const DecodeArguments& a, const DecodeTask& task,
                           const float* log2_lambda, Stages& smem)
      : Base(a), smem_(smem), log2_lambda_(log2_lambda) {
    task_ = &task;
    tile_steps_ = a.problem.threshold.skip_block / kTileKeys;
    tiles_ = (task.length + a.problem.threshold.skip_block - 1) / a.problem.threshold.skip_block;
  }

  // Attends to visits split, split + splits, ...
  __device__ void run(int split, int splits, WarpResult<Config>& result) {
    if (split >= tiles_) return;
    Cursor ahead{split, 0};  // what is loaded next
    Base::load_queries();
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) vote_max(i) = negative_infinity();
    KeyPlace next = place_in(ahead);
    const auto load_next = [&](int stage) {
      load(smem_.keys[stage], smem_.key_positions[stage], next, task_->k);
      ahead.step += 1;
      if (ahead.step == tile_steps_) ahead = {ahead.visit + splits, 0};
      next = place_in(ahead);
    };
#pragma unroll
    for (int i = 0; i < kStages; ++i) load_next(i);
    int stage = 0;
    for (int visit = split; visit < tiles_; visit += splits) {
      Scores scores[kParks ? 1 : kMaxTileSteps];
      float maxima[kLaneColumns];
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) maxima[i] = negative_infinity();
      for_each_step([&](int step) {
        cp_async_wait<kStages - 1>();
        __syncwarp();
        Scores& own = scores[kParks ? 0 : step];
        score_step(stage, own, maxima);
        if constexpr (kParks) park(step, own);
        __syncwarp();
        load_next(stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      });
      reduce(maxima);
      const bool kept = visit == split || vetoes(maxima);
      if (!kept) {
        ++skipped_;
        continue;
      }
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) vote_max(i) = max_nan(vote_max(i), maxima[i]);
      Base::rescale(maxima, result);
      attend(visit, scores, result);
    }
    cp_async_wait<0>();
  }

  // Adds this warp's tiles to the counters of the item's heads.
  __device__ void store_counters(int split, int splits) const {
    int64_t* const counters = a_.problem.threshold.counters;
    if (counters == nullptr || lane_ >= task_->item.heads || split >= tiles_) return;
    const int64_t head = task_->item.batch * a_.problem.num_heads + task_->item.head + lane_;
    auto* const own = reinterpret_cast<unsigned long long*>(counters + head * 2);
    const int visited = (tiles_ - split + splits - 1) / splits;
    if (skipped_ > 0) atomicAdd(own, static_cast<unsigned long long>(skipped_));
    atomicAdd(own + 1, static_cast<unsigned long long>(visited));
  }

 private:
  struct Cursor {
    int visit;
    int step;  // 16 keys of the tile
  };

  // Of this lane's key, lane % 16 of the 16.
  __device__ KeyPlace place_in(const Cursor& cursor) const {
    if (cursor.visit >= tiles_) return {0, 0, KeyPlace::kNowhere};
    const int tile = cursor.visit == 0 ? tiles_ - 1 : cursor.visit - 1;
    const int key = (tile * tile_steps_ + cursor.step) * kTileKeys + lane_ % kTileKeys;
    if (key >= task_->length) return {0, 0, KeyPlace::kNowhere};
    return place_of(a_, *task_, key);
  }

  // Starts the copies of 16 rows of K or V; those that do not exist become zeros.
  __device__ void load(Stored* rows, int* positions, const KeyPlace& place,
                       const KeySource& source) const {
    if (lane_ < kTileKeys) positions[lane_] = place.position;
    const bool exists = place.position != KeyPlace::kNowhere;
    const uint32_t mask = __ballot_sync(0xffffffffu, exists);
    const auto* row_start = static_cast<const Stored*>(source.data);
    if (exists) row_start += place.outer * source.stride_outer + place.row * source.stride_row;
    const auto address = reinterpret_cast<unsigned long long>(row_start);
    constexpr int kPassRows = kWarpThreads / Config::kRowChunks;
    const int chunk = lane_ % Config::kRowChunks;
#pragma unroll 4  // the addresses of all passes at once would need too many registers
    for (int pass = 0; pass < kTileKeys / kPassRows; ++pass) {
      const int row = pass * kPassRows + lane_ / Config::kRowChunks;
      const auto from = __shfl_sync(0xffffffffu, address, row) + chunk * 16;
      cp_async_16_or_zero(rows + Config::offset(row, chunk), reinterpret_cast<const void*>(from),
                          mask >> row & 1u);
    }
    cp_async_commit();
  }

  // Scores of 16 keys, masked, and their maxima among this lane's.
  __device__ void score_step(int stage, Scores& scores, float (&maxima)[kLaneColumns]) const {
#pragma unroll
    for (int i = 0; i < 4 * kColumnTiles; ++i) scores[i / 4][i % 4] = 0.0f;
    Base::score(smem_.keys[stage], scores);
    Base::mask(smem_.key_positions[stage], scores);
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const auto& tile = scores[i / 2];
      maxima[i] = max_nan(maxima[i], max_nan(tile[i % 2], tile[i % 2 + 2]));
    }
  }
  __device__ void park(int step, const Scores& scores) {
#pragma unroll
    for (int i = 0; i < 4 * kColumnTiles; ++i) {
      smem_.scores[step * 4 * kColumnTiles + i][lane_] = scores[i / 4][i % 4];
    }
  }
  __device__ void fetch_parked(int step, Scores& scores) const {
#pragma unroll
    for (int i = 0; i < 4 * kColumnTiles; ++i) {
      scores[i / 4][i % 4] = smem_.scores[step * 4 * kColumnTiles + i][lane_];
    }
  }

  // Over all lanes of a column.
  static __device__ void reduce(float (&maxima)[kLaneColumns]) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
#pragma unroll
      for (int distance = 4; distance < kWarpThreads; distance *= 2) {
        maxima[i] = max_nan(maxima[i], __shfl_xor_sync(0xffffffffu, maxima[i], distance));
      }
    }
  }

  // All lanes of a column write the same, and read what they wrote.
  __device__ float& vote_max(int i) { return smem_.vote_max[Base::column_of(i / 2, i % 2)]; }

  __device__ bool vetoes(const float (&maxima)[kLaneColumns]) {
    bool veto = false;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      veto |= limit_[i] != Base::kNoColumn &&
              attnsieve::row_vetoes(maxima[i], vote_max(i), scale_log2_,
                                    log2_lambda_[Base::column_of(i / 2, i % 2)]);
    }
    return __any_sync(0xffffffffu, veto);
  }

  // The values of a kept tile: nothing was loaded before the vote.
  template <int kSlots>
  __device__ void attend(int visit, Scores (&scores)[kSlots], WarpResult<Config>& result) {
    int stage = 0;
    const auto load_step = [&](int step) {
      load(smem_.values[stage], smem_.value_positions[stage], place_in({visit, step}), task_->v);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    };
#pragma unroll
    for (int step = 0; step < kStages; ++step) load_step(step);
    for_each_step([&](int step) {
      Scores& own = scores[kParks ? 0 : step];
      if constexpr (kParks) fetch_parked(step, own);
      Base::weigh(own, result.softmax);
      cp_async_wait<kStages - 1>();
      __syncwarp();
      if (__any_sync(0xffffffffu, is_mixed(smem_.value_positions[stage]))) {
        Base::isolate(smem_.value_positions[stage], smem_.values[stage], own, result);
      }
      typename Base::Rounded weights;
      Base::round(own, weights);
      Base::accumulate(smem_.values[stage], weights, result);
      __syncwarp();
      if (step + kStages < tile_steps_) {
        load_step(step + kStages);
      } else {
        cp_async_commit();  // so that a step waits for as many groups as any other
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
    });
  }

  // f(step) for the 16-key steps of a tile. Unrolled where scores are in registers.
  template <class F>
  __device__ void for_each_step(F&& f) const {
    if constexpr (kParks) {
#pragma unroll 1
      for (int step = 0; step < tile_steps_; ++step) f(step);
    } else {
#pragma unroll
      for (int step = 0; step < kMaxTileSteps; ++step) {
        if (step >= tile_steps_) break;
        f(step);
      }
    }
  }

  // Whether some column sees a key that another does not.
  __device__ bool is_mixed(const int* key_positions) const {
    const int positions[2] = {key_positions[lane_ / 4], key_positions[lane_ / 4 + 8]};
    bool mixed = false;
#pragma unroll
    for (int i = 0; i < 2 * kLaneColumns; ++i) {
      const int position = positions[i % 2];
      const int limit = limit_[i / 2];
      mixed |= position > limit && position != KeyPlace::kNowhere && limit != Base::kNoColumn;
    }
    return mixed;
  }

  Stages& smem_;
  const float* log2_lambda_;
  int tile_steps_;
  int tiles_;
  int skipped_ = 0;
};

}  // namespace attnsieve::sm80
