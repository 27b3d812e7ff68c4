// Computes        As kernel.cuh, for one query row and up to 8 heads of a key head that are reduced
//                 all or not at all: the step of decoding, bound by the reads of the keys.
// Roles           A CTA owns a key head and a block of steps of 16 to 128 units, which its warps take
//                 in turn. Heads are an MMA's columns, units its rows; bounds are two products, with
//                 the negative and the positive part of the queries.
// Shared memory   none: operands come straight from memory (fragments.cuh), queries stay in
//                 registers.
// Pipeline        The places of the next step are looked up while this step's keys arrive; what hides
//                 the latency of the keys is 16 loads a lane and the other warps of the SM.
// Invariants      Every score is computed from its own unit and vectors in one order. Units that are
//                 no candidates are never read.
// Not handled     Codes, key scales, several rows, softmax, pages of tokens: kernel.cuh.
#pragma once

#include "cuda/sm80/proxy_scores/fragments.cuh"

namespace attnsieve::sm80 {

inline constexpr int kStreamThreads = kStreamWarps * kWarpThreads;

// The lane, read anew: what follows from it holds no registers while the keys arrive.
__device__ __forceinline__ int reread_lane_index() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

template <class Element, int kDim, bool kBounds>
class ScoreStream {
  static constexpr int kPieces = stream_pieces(kDim);
  static constexpr int kSides = kBounds ? 2 : 1;
  static constexpr int kTiles = stream_tiles(kDim, kBounds);
  // Units lie in blocks. Of each block four lanes share kRun units, rows of its M-tiles: first the
  // rows lane / 4 and + 8 of one tile, then those of the next. Every lane owns one: it finds its
  // place and stores its score.
  static constexpr int kRun = kTiles == 1 ? 2 : 4;
  static constexpr int kBlockTiles = kRun / 2;
  static constexpr int kBlocks = kTiles / kBlockTiles;
  static constexpr int kBlockUnits = 16 * kBlockTiles;
  static constexpr int kStepUnits = 16 * kTiles;

 public:
  __device__ explicit ScoreStream(const ProxyScoresArguments& a)
      : a_(a),
        p_(a.problem),
        lane_(lane_index()),
        key_head_(static_cast<int>(blockIdx.x % static_cast<unsigned>(p_.num_key_heads))),
        batch_(static_cast<int>(blockIdx.x / static_cast<unsigned>(p_.num_key_heads)) /
               a.plan.stream_blocks),
        units_(p_, batch_) {
    const int block = static_cast<int>(blockIdx.x / static_cast<unsigned>(p_.num_key_heads)) %
                      a.plan.stream_blocks;
    const int block_units = a.plan.steps * kStreamWarps * kStepUnits;
    first_ = block * block_units;
    end_ = static_cast<int>(min64(p_.units, int64_t{first_} + block_units));
    first_ += static_cast<int>(threadIdx.x) / kWarpThreads * kStepUnits;
    const int64_t first_line =
        batch_ * p_.num_out_heads + (reduced() ? key_head_ : key_head_ * a.plan.heads_per_key);
    lines_ = p_.scores + first_line * p_.units;
  }

  __device__ void run() {
    int outer[kBlocks];  // of the lane's own units, not yet checked
    find_outer(first_, outer);
    load_queries();
#pragma unroll 1
    for (int step = first_; step < end_; step += kStreamWarps * kStepUnits) {
      unsigned candidates[kBlocks];  // a bit for the own unit of every lane
      UnitPlace places[kBlocks];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        places[block] = units_.place_of(step + block * kBlockUnits + own_unit(lane_), outer[block]);
        candidates[block] = __ballot_sync(kAllLanes, places[block].outer >= 0);
      }
      load_keys(places);
      find_outer(step + kStreamWarps * kStepUnits, outer);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        score_block(step + block * kBlockUnits, block, candidates[block]);
      }
    }
  }

 private:
  // In a block.
  static __device__ int own_unit(int lane) { return kTiles == 1 ? lane / 4 * 2 + lane % 2 : lane; }

  __device__ void find_outer(int step, int (&outer)[kBlocks]) const {
    const int own = own_unit(reread_lane_index());
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int unit = step + block * kBlockUnits + own;
      outer[block] = unit < end_ ? units_.outer_of(unit) : -1;
    }
  }

  __device__ bool piece_exists(int piece) const {
    return piece * 32 + lane_ % 4 * 8 < static_cast<int>(p_.head_dim);
  }

  __device__ void load_queries() {
    const int column = lane_ / 4;
    const int head = key_head_ * a_.plan.heads_per_key + column;
    const bool exists = column < a_.plan.heads_per_key;
    const auto* q = static_cast<const Element*>(p_.q.data) + batch_ * p_.q.stride_batch +
                    head * p_.q.stride_head + lane_ % 4 * 8;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const uint4 x = exists && piece_exists(piece)
                          ? __ldg(reinterpret_cast<const uint4*>(q + piece * 32))
                          : no_piece();
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        queries_[side][piece] = kBounds ? part_of<Element>(x, side) : x;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight_[i] = 1.0f;
      const int own = lane_ % 4 * 2 + i;
      if (p_.head_weights.data == nullptr || own >= a_.plan.heads_per_key) continue;
      weight_[i] =
          p_.head_weights
              .data[batch_ * p_.head_weights.stride_batch +
                    (key_head_ * a_.plan.heads_per_key + own) * p_.head_weights.stride_head];
    }
  }

  // places[block]: of the lane's own unit.
  __device__ void load_keys(const UnitPlace (&places)[kBlocks]) {
    const auto* keys =
        static_cast<const Element*>(p_.keys.data) + key_head_ * p_.keys.stride_head + lane_ % 4 * 8;
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
      const int owner = lane_ / 4 * 4 + row % kRun;
      const int outer = __shfl_sync(kAllLanes, places[row / kRun].outer, owner);
      const int in_outer = __shfl_sync(kAllLanes, places[row / kRun].row, owner);
      const Element* const key =
          keys + outer * p_.keys.stride_batch + in_outer * p_.keys.stride_row;
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          const auto* source =
              reinterpret_cast<const uint4*>(key + side * p_.keys_stride_bound + piece * 32);
          keys_[row][side][piece] = outer >= 0 && piece_exists(piece) ? __ldcs(source) : no_piece();
        }
      }
    }
  }

  __device__ void score_block(int first_unit, int block, unsigned candidates) {
    float scores[kRun][2];  // of this lane's columns
#pragma unroll
    for (int tile = 0; tile < kBlockTiles; ++tile) {
      const int row = block * kRun + 2 * tile;
      float sums[4] = {};
      constexpr float kUnscaled[2] = {1.0f, 1.0f};
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          multiply_pieces<Element>(keys_[row][side][piece], keys_[row + 1][side][piece],
                                   queries_[side][piece], sums, kUnscaled);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = sums[i] * p_.score_scale;
        if (p_.element == ProxyElement::kReluDot) x = x < 0.0f ? 0.0f : x;
        scores[2 * tile + i / 2][i % 2] = x * weight_[i % 2];
      }
    }
    if (reduced()) {
      store_reduced(first_unit, candidates, scores);
    } else {
      store_columns(first_unit, candidates, scores);
    }
  }

  __device__ bool reduced() const { return a_.plan.heads_per_out > 1; }

  __device__ void store_reduced(int first_unit, unsigned candidates,
                                const float (&scores)[kRun][2]) {
    const int lane = reread_lane_index();
    const bool max = p_.head_reduce == Reduction::kMax;
    const float empty = max ? negative_infinity() : 0.0f;
    float own = 0.0f;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      float columns[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        columns[j] = lane % 4 * 2 + j < a_.plan.heads_per_key ? scores[i][j] : empty;
      }
      float x = max ? max_nan(columns[0], columns[1]) : columns[0] + columns[1];
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, x, distance);
        x = max ? max_nan(x, other) : x + other;
      }
      if (lane % kRun == i) own = x;
    }
    if (p_.head_reduce == Reduction::kMean) own /= static_cast<float>(a_.plan.heads_per_key);
    const int unit = first_unit + own_unit(lane);
    if (unit >= end_ || lane % 4 >= kRun) return;
    lines_[unit] = (candidates >> lane & 1) != 0 ? own : negative_infinity();
  }

  __device__ void store_columns(int first_unit, unsigned candidates, float (&scores)[kRun][2]) {
    const int lane = reread_lane_index();
    const int unit = first_unit + lane / 4 * kRun;
    const unsigned own_candidates = candidates >> (lane / 4 * 4);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if ((own_candidates >> i & 1) != 0) continue;
      scores[i][0] = negative_infinity();
      scores[i][1] = negative_infinity();
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = lane % 4 * 2 + j;
      if (column >= a_.plan.heads_per_key) continue;
      float* const to = lines_ + column * p_.units + unit;
      if (p_.units % kRun == 0 && unit + kRun <= end_) {
        if constexpr (kRun == 4) {
          *reinterpret_cast<float4*>(to) =
              make_float4(scores[0][j], scores[1][j], scores[2][j], scores[3][j]);
        } else {
          *reinterpret_cast<float2*>(to) = make_float2(scores[0][j], scores[1][j]);
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (unit + i < end_) to[i] = scores[i][j];
      }
    }
  }

  const ProxyScoresArguments& a_;
  const ProxyScoresProblem& p_;
  int lane_;
  int key_head_;
  int batch_;
  ScoredUnits units_;
  int first_, end_;  // units
  float* lines_;  // of the key head's scores
  uint4 queries_[kSides][kPieces];
  float weight_[2];
  uint4 keys_[2 * kTiles][kSides][kPieces];
};

template <class Element, int kDim, bool kBounds>
__global__ void __launch_bounds__(kStreamThreads, kStreamCtasPerSm)
    stream_scores_kernel(const __grid_constant__ ProxyScoresArguments a) {
  ScoreStream<Element, kDim, kBounds>(a).run();
}

}  // namespace attnsieve::sm80
