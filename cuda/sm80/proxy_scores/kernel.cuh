// Computes        scores[b, i, H, m]: element (a dot product, its positive part, or Quest's bound),
//                 times scale and head weight, reduced over rows, softmax over the units, reduced
//                 over heads and over the units of column m; -inf where there is no candidate.
// Roles           A warp owns an item: 32 units, one a lane, of 32 / lanes_per_column columns, and a
//                 group of outputs. A column of more units is reached in turns of its lanes.
// Shared memory   A tile of 16 vectors x 32 units a warp (2.3 KB).
// Invariants      Every score is computed from its own unit and vectors in one order: nothing else
//                 in the batch, and not how it is cut, changes a bit of it. Units that are no
//                 candidates are never read.
// Not handled     Keeping queries in registers, where a problem allows it: stream.cuh.
#pragma once

#include "cuda/sm80/proxy_scores/tile.cuh"

namespace attnsieve::sm80 {

inline constexpr int kScoreWarps = 4;
inline constexpr int kScoreThreads = kScoreWarps * kWarpThreads;
inline constexpr int kScoreCtasPerSm = 3;

template <class Element>
class ScoreItem {
 public:
  __device__ ScoreItem(const ProxyScoresArguments& a, int item, ScoreTile& tile)
      : a_(a),
        p_(a.problem),
        batch_(item / a.plan.column_blocks / a.plan.groups),
        units_(p_, batch_),
        scores_(a, batch_, tile) {
    const ProxyScoresPlan& plan = a.plan;
    const int group = item / plan.column_blocks % plan.groups;
    const int head_groups = static_cast<int>(p_.num_heads) / plan.group_heads;
    vectors_ = {group / head_groups * plan.group_rows, plan.group_rows,
                group % head_groups * plan.group_heads, plan.group_heads, plan.merged_rows};
    const int columns = kScoreTileUnits / plan.lanes_per_column;
    column_ = static_cast<int64_t>(item % plan.column_blocks) * columns +
              lane_index() / plan.lanes_per_column;
  }

  __device__ void run() {
    for (int turn = 0; turn < a_.plan.turns; ++turn) {
      const bool any = take_unit(turn);
      if (any) {
        scores_.for_each_head(vectors_, [&](int row, int head, float score, bool sees) {
          add_head(row, head, score, sees);
        });
      } else if (a_.plan.turns == 1) {
        write_nothing();
      }
    }
    if (a_.plan.turns > 1) write(vectors_.first_row, vectors_.first_head);
  }

 private:
  // Whether any lane has a candidate.
  __device__ bool take_unit(int turn) {
    const int lanes = a_.plan.lanes_per_column;
    const int64_t per_column = p_.units_per_column();
    const int64_t slot = static_cast<int64_t>(turn) * lanes + lane_index() % lanes;
    const int64_t unit = column_ * per_column + slot;
    UnitPlace place{-1, 0};
    if (slot < per_column && unit < p_.units && vectors_.merged > 0) {
      place = units_.place_of(static_cast<int>(unit));
    }
    const bool exists = place.outer >= 0;
    scores_.set_unit(place, exists ? units_.first_row(static_cast<int>(unit)) : 0);
    return __any_sync(kAllLanes, exists);
  }

  __device__ void add_head(int row, int head, float score, bool sees) {
    if (sees && p_.softmax) score = normalized(row, head, score);
    const int heads = a_.plan.heads_per_out;
    const int position = head % heads;
    heads_ = position == 0 ? score : combine(p_.head_reduce, heads_, score);
    if (position + 1 < heads) return;
    if (sees) {
      float value = static_cast<float>(heads_);
      if (p_.head_reduce == Reduction::kMean) value /= static_cast<float>(heads);
      column_value_ = members_ == 0 ? value : combine(p_.page_reduce, column_value_, value);
      ++members_;
    }
    if (a_.plan.turns == 1) write(row, head);
  }

  __device__ float normalized(int row, int head, float score) const {
    const int64_t line = (static_cast<int64_t>(batch_) * a_.plan.out_rows + row) * p_.num_heads;
    const SoftmaxTotal total = a_.totals[line + head];
    return total.max == negative_infinity() ? 0.0f : expf(score - total.max) * total.sum;
  }

  // The lanes' results of a column, in one of its output lines, and starts the next output.
  __device__ void write(int row, int head) {
    const int lanes = a_.plan.lanes_per_column;
    for (int distance = 1; distance < lanes; distance *= 2) {
      const double other = __shfl_xor_sync(kAllLanes, column_value_, distance);
      const int others = __shfl_xor_sync(kAllLanes, members_, distance);
      if (members_ > 0 && others > 0) {
        column_value_ = combine(p_.page_reduce, column_value_, other);
      } else if (others > 0) {
        column_value_ = other;
      }
      members_ += others;
    }
    const int64_t columns = a_.plan.columns;
    if (lane_index() % lanes == 0 && column_ < columns) {
      float value = static_cast<float>(column_value_);
      if (p_.page_reduce == Reduction::kMean) value /= static_cast<float>(members_);
      const int64_t line =
          (static_cast<int64_t>(batch_) * a_.plan.out_rows + row) * p_.num_out_heads +
          head / a_.plan.heads_per_out;
      p_.scores[line * columns + column_] = members_ > 0 ? value : negative_infinity();
    }
    members_ = 0;
  }

  __device__ void write_nothing() {
    for (int row = 0; row < vectors_.rows; ++row) {
      for (int head = 0; head < vectors_.heads; head += a_.plan.heads_per_out) {
        write(vectors_.first_row + row, vectors_.first_head + head);
      }
    }
  }

  const ProxyScoresArguments& a_;
  const ProxyScoresProblem& p_;
  int batch_;
  ScoredUnits units_;
  UnitScores<Element> scores_;
  QueryVectors vectors_;
  int64_t column_;
  double heads_ = 0.0;  // of the output head so far
  double column_value_ = 0.0;  // of the lane's units of the column so far
  int members_ = 0;
};

template <class Element>
__global__ void __launch_bounds__(kScoreThreads, kScoreCtasPerSm)
    proxy_scores_kernel(const __grid_constant__ ProxyScoresArguments a) {
  __shared__ ScoreTile tiles[kScoreWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kScoreWarps + warp;
  if (item >= a.plan.items) return;
  ScoreItem<Element>(a, static_cast<int>(item), tiles[warp]).run();
}

}  // namespace attnsieve::sm80
