// One warp's visiting sequence: scores of a tile, a vote of all columns, and only for a kept tile its
// values, step by step under the keys of the next tile, so that a warp has both on their way.
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
  static constexpr int kSlots = kParks ? 1 : kMaxTileSteps;  // for scores in registers
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
    length_ = task.length;
    table_ = task.table;
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
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) {
      cp_async_commit();
      load_next(i);
    }
    int stage = 0;
    int value_stage = 0;
    int kept_visit = kNone;  // whose values are still to be added
    Scores scores[kSlots];
    for (int visit = split; visit < tiles_ || kept_visit != kNone; visit += splits) {
      float maxima[kLaneColumns];
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) maxima[i] = negative_infinity();
      bool mixed = false;
      for_each_step([&](int step) {
        if (kept_visit != kNone) {
          if constexpr (kParks) fetch_parked(step, scores[0]);
          attend_step(step, kept_visit, value_stage, scores[0], result);
        } else {
          cp_async_commit();  // so that a step waits for as many groups as any other
        }
        rotate(scores);
        cp_async_wait<kSteady>();
        __syncwarp();
        Scores& own = scores[kSlots - 1];
        mixed |= score_step(stage, own, maxima);
        if constexpr (kParks) park(step, own);
        __syncwarp();
        load_next(stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      });
      kept_visit = kNone;
      if (visit >= tiles_) break;
      reduce(maxima);
      if (visit != split && !vetoes(maxima)) {
        ++skipped_;
        continue;
      }
      raise_vote_maxima(maxima);
      Base::rescale(maxima, result);
      kept_visit = visit;
      mixed_ = __any_sync(0xffffffffu, mixed);
      value_stage = 0;
#pragma unroll
      for (int step = 0; step < kStages; ++step) load_values(step, kept_visit, step);
#pragma unroll 1
      for (int step = tile_steps_; step < kSlots; ++step) rotate(scores);
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
  static constexpr int kPassRows = kWarpThreads / Config::kRowChunks;  // of a warp's copies at once
  static constexpr int kNone = -1;
  static constexpr int kSteady = 2 * kStages - 1;  // groups behind the one a step waits for
  static_assert(kStages <= 3, "attend_step() counts the groups of three steps");

  struct Cursor {
    int visit;
    int step;  // 16 keys of the tile
  };

  // Of this lane's key, lane % 16 of the 16.
  __device__ KeyPlace place_in(const Cursor& cursor) const {
    if (cursor.visit >= tiles_) return {0, 0, KeyPlace::kNowhere};
    const int tile = cursor.visit == 0 ? tiles_ - 1 : cursor.visit - 1;
    const int key = (tile * tile_steps_ + cursor.step) * kTileKeys + lane_ % kTileKeys;
    if (key >= length_) return {0, 0, KeyPlace::kNowhere};
    return place_of_key(a_, *task_, table_, key);
  }

  // Starts the copies of 16 rows of K or V; those that do not exist become zeros.
  __device__ void load(Stored* rows, int* positions, const KeyPlace& place,
                       const KeySource& source) const {
    if (lane_ < kTileKeys) positions[lane_] = place.position;
    const KeyPlace first{place.outer, place.row - lane_ % kTileKeys, 0};
    bool follows = place.position != KeyPlace::kNowhere;
    if (table_ != nullptr) {
      const int outer = __shfl_sync(0xffffffffu, first.outer, 0);
      const int row = __shfl_sync(0xffffffffu, first.row, 0);
      follows &= first.outer == outer && first.row == row;
    }
    if (__all_sync(0xffffffffu, follows)) {
      copy_run(rows, first, source);
    } else {
      scatter(rows, place, source);
    }
    cp_async_commit();
  }

  // Of rows that follow each other, as in a contiguous tensor and in most pages.
  __device__ void copy_run(Stored* rows, const KeyPlace& first, const KeySource& source) const {
    // An address may not be overwritten before its copy has read it: as many at once as registers
    // allow.
    constexpr int kPasses = kTileKeys / kPassRows;
    constexpr int kAtOnce = kParks && kPasses > 4 ? 4 : kPasses;
    const int64_t stride = source.stride_row;
    const int row = lane_ / Config::kRowChunks;
    const int chunk = lane_ % Config::kRowChunks;
    const auto* from = static_cast<const Stored*>(source.data) + first.outer * source.stride_outer +
                       (first.row + row) * stride + chunk * Config::kChunkElements;
#pragma unroll
    for (int pass = 0; pass < kPasses; pass += kAtOnce) {
      const Stored* addresses[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        addresses[i] = from + (pass + i) * kPassRows * stride;
        asm volatile("" : "+l"(addresses[i]));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        cp_async_16(rows + Config::offset((pass + i) * kPassRows + row, chunk), addresses[i]);
      }
    }
  }

  // Of any rows: their addresses are passed from lane to lane.
  __device__ void scatter(Stored* rows, const KeyPlace& place, const KeySource& source) const {
    const bool exists = place.position != KeyPlace::kNowhere;
    const uint32_t mask = __ballot_sync(0xffffffffu, exists);
    const auto* row_start = static_cast<const Stored*>(source.data);
    if (exists) row_start += place.outer * source.stride_outer + place.row * source.stride_row;
    const auto address = reinterpret_cast<unsigned long long>(row_start);
    const int chunk = lane_ % Config::kRowChunks;
#pragma unroll 1
    for (int pass = 0; pass < kTileKeys / kPassRows; ++pass) {
      const int row = pass * kPassRows + lane_ / Config::kRowChunks;
      const auto from = __shfl_sync(0xffffffffu, address, row) + chunk * 16;
      cp_async_16_or_zero(rows + Config::offset(row, chunk), reinterpret_cast<const void*>(from),
                          mask >> row & 1u);
    }
  }

  // Scores of 16 keys, masked, and their maxima among this lane's.
  // Returns whether some column sees a key that another does not.
  __device__ bool score_step(int stage, Scores& scores, float (&maxima)[kLaneColumns]) const {
#pragma unroll
    for (int i = 0; i < 4 * kColumnTiles; ++i) scores[i / 4][i % 4] = 0.0f;
    Base::score(smem_.keys[stage], scores);
    const bool mixed = Base::mask(smem_.key_positions[stage], scores);
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const auto& tile = scores[i / 2];
      maxima[i] = max_nan(maxima[i], max_nan(tile[i % 2], tile[i % 2 + 2]));
    }
    return mixed;
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

  __device__ float& vote_max(int i) { return smem_.vote_max[Base::column_of(i / 2, i % 2)]; }

  // Takes the maxima of a kept tile into account; one lane writes what all of a column have read.
  __device__ void raise_vote_maxima(const float (&maxima)[kLaneColumns]) {
    float raised[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) raised[i] = max_nan(vote_max(i), maxima[i]);
    __syncwarp();
    if (lane_ >= kWarpThreads / 8) return;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) vote_max(i) = raised[i];
  }

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

  __device__ void load_values(int stage, int visit, int step) const {
    load(smem_.values[stage], smem_.value_positions[stage], place_in({visit, step}), task_->v);
  }

  // Adds the values of 16 keys of a kept tile. The groups of copies behind those values may still be
  // under way: after the vote the values of kStages steps were asked for, one group each; then every
  // step asked for the values of a further step and for the keys of one. So kStages - 1 groups lie
  // behind those of the first step, one more behind each of the next, and kSteady behind the rest.
  __device__ void attend_step(int step, int visit, int& stage, Scores& own,
                              WarpResult<Config>& result) {
    Base::weigh(own, result.softmax);
    if (step == 0) {
      cp_async_wait<kStages - 1>();
    } else if (step == 1) {
      cp_async_wait<kStages>();
    } else if (step == 2) {
      cp_async_wait<(kStages + 1 < kSteady ? kStages + 1 : kSteady)>();
    } else {
      cp_async_wait<kSteady>();
    }
    __syncwarp();
    if (mixed_ && __any_sync(0xffffffffu, is_mixed(smem_.value_positions[stage]))) {
      Base::isolate(smem_.value_positions[stage], smem_.values[stage], own, result);
    }
    typename Base::Rounded weights;
    Base::round(own, weights);
    Base::accumulate(smem_.values[stage], weights, result);
    __syncwarp();
    if (step + kStages < tile_steps_) {
      load_values(stage, visit, step + kStages);
    } else {
      cp_async_commit();
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  // f(step) for the 16-key steps of a tile. Not unrolled: the instruction cache would not hold them.
  template <class F>
  __device__ void for_each_step(F&& f) const {
#pragma unroll 1
    for (int step = 0; step < tile_steps_; ++step) f(step);
  }
  // So the scores of a step have a place among registers all the same.
  static __device__ void rotate(Scores (&scores)[kSlots]) {
#pragma unroll
    for (int slot = 0; slot + 1 < kSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < 4 * kColumnTiles; ++i) {
        scores[slot][i / 4][i % 4] = scores[slot + 1][i / 4][i % 4];
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
  int length_;  // of the task: read for every 16 keys, like its table
  const int* table_;
  int skipped_ = 0;
  bool mixed_;  // of the tile kept last: some column sees a key that another does not
};

}  // namespace attnsieve::sm80
