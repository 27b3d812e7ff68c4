// Computes        As kernel.cuh, for one query row and up to 8 heads of a key head that are reduced
//                 all or not at all: the step of decoding, bound by the reads of the keys.
// Roles           A CTA owns a key head and a block of steps of 16 to 128 units, which its warps take
//                 in turn. Heads are an MMA's columns, units its rows; bounds are two products, with
//                 the negative and the positive part of the queries.
// Shared memory   none for operands: they come straight from memory (fragments.cuh), queries stay in
//                 registers. Where queries are projected, the sums of that.
// Pipeline        The places of the next step are looked up while this step's keys arrive; what hides
//                 the latency of the keys is 16 loads a lane and the other warps of the SM. While
//                 queries are projected the first keys travel to L2.
// Invariants      Every score is computed from its own unit and vectors in one order. Units that are
//                 no candidates are never read.
// Not handled     Codes, key scales, several rows, softmax, pages of tokens: kernel.cuh.
#pragma once

#include "cuda/sm80/proxy_scores/fragments.cuh"
#include "cuda/sm80/proxy_scores/projection.cuh"

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
  // place and stores its score. Those of four lanes lie side by side, so that they are stored at
  // once; where rows are shorter than a line of memory, those of one load do.
  static constexpr int kRun = kTiles == 1 ? 2 : 4;
  static constexpr int kBlockTiles = kRun / 2;
  static constexpr int kBlocks = kTiles / kBlockTiles;
  static constexpr int kBlockUnits = 16 * kBlockTiles;
  static constexpr int kStepUnits = 16 * kTiles;
  static constexpr bool kNarrow = kDim == 32 && !kBounds;
  static constexpr bool kProjects = kDim <= kMaxProjectedDim && !kBounds;
  using Projection = QueryProjection<Element, kStreamThreads, kDim>;

 public:
  using SharedStorage = typename Projection::SharedStorage;

  __device__ ScoreStream(const ProxyScoresArguments& a, SharedStorage& smem)
      : a_(a),
        p_(a.problem),
        lane_(lane_index()),
        key_head_(static_cast<int>(blockIdx.x % static_cast<unsigned>(p_.num_key_heads))),
        batch_(static_cast<int>(blockIdx.x / static_cast<unsigned>(p_.num_key_heads)) /
               a.plan.stream_blocks),
        units_(p_, batch_),
        smem_(smem),
        least_(p_.element == ProxyElement::kReluDot ? 0.0f : negative_infinity()) {
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
    constexpr int kStride = kStreamWarps * kStepUnits;
    int outer[kBlocks];  // of the lane's own units, not yet checked
    if (!contiguous()) find_outer(first_, outer);
    load_queries();
#pragma unroll 1
    for (int step = first_; step < end_; step += kStride) {
      unsigned candidates[kBlocks];  // a bit for the own unit of every lane
      if (contiguous() && step + kStepUnits <= end_ && units_.in_range(step) &&
          units_.in_range(step + kStepUnits - 1)) {
        load_all_keys(step);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) candidates[block] = ~0u;
      } else {
        if (contiguous()) find_outer(step, outer);
        load_keys(step, outer, candidates);
        if (!contiguous()) find_outer(step + kStride, outer);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        score_block(step + block * kBlockUnits, block, candidates[block]);
      }
    }
  }

 private:
  // Whether units lie at equal distances, with nothing to look up.
  __device__ bool contiguous() const { return !kBounds && p_.pages.block_table == nullptr; }

  // Which of a block's units lane / 4 and row stand for.
  static __device__ int unit_of(int lane, int row) {
    return kNarrow ? row * 8 + lane / 4 : lane / 4 * kRun + row;
  }
  static __device__ int own_unit(int lane) { return unit_of(lane, lane % kRun); }

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

  // An MMA's columns are the heads of the key head; where these fit twice, they are there twice.
  __device__ void load_queries() {
    const int heads = a_.plan.heads_per_key;
    const int column = (lane_ / 4) & (column_period() - 1);
    const auto* q = static_cast<const Element*>(p_.q.data) + batch_ * p_.q.stride_batch +
                    static_cast<int64_t>(key_head_) * heads * p_.q.stride_head;
    const bool projected = kProjects && p_.projection.data != nullptr;
    if (projected) {
      prefetch_keys();
      Projection::run(
          p_,
          static_cast<const Element*>(p_.projection.data) + batch_ * p_.projection.stride_batch +
              key_head_ * p_.projection.stride_head,
          heads, [&](int v) { return q + v * p_.q.stride_head; }, smem_);
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int first = piece * 32 + lane_ % 4 * 8;
      uint4 x = no_piece();
      if (projected) {
        x = *reinterpret_cast<const uint4*>(&smem_.rows[column][first]);
      } else if (column < heads && piece_exists(piece)) {
        x = __ldg(reinterpret_cast<const uint4*>(q + column * p_.q.stride_head + first));
      }
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
        queries_[side][piece] = kBounds ? part_of<Element>(x, side) : x;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight_[i] = p_.score_scale;
      const int own = (lane_ % 4 * 2 + i) & (column_period() - 1);
      if (p_.head_weights.data == nullptr || own >= heads) continue;
      weight_[i] *= p_.head_weights.data[batch_ * p_.head_weights.stride_batch +
                                         (key_head_ * heads + own) * p_.head_weights.stride_head];
    }
  }

  // The beginnings of the first step's rows, where nothing has to be looked up.
  __device__ void prefetch_keys() const {
    if (!contiguous()) return;
    const char* const keys = reinterpret_cast<const char*>(
        static_cast<const Element*>(p_.keys.data) + key_head_ * p_.keys.stride_head +
        batch_ * p_.keys.stride_batch);
    for (int i = lane_; i < kStepUnits; i += kWarpThreads) {
      const int64_t unit = min(first_ + i, static_cast<int>(p_.units) - 1);
      const char* const row = keys + unit * p_.keys.stride_row * sizeof(Element);
      asm volatile("prefetch.global.L2 [%0];" ::"l"(row));
    }
  }

  // A power of 2.
  __device__ int column_period() const {
    const int heads = a_.plan.heads_per_key;
    return (heads & (heads - 1)) == 0 ? heads : 8;
  }

  // Of the units that find_outer() found; and tells the candidates.
  __device__ void load_keys(int step, const int (&outer)[kBlocks],
                            unsigned (&candidates)[kBlocks]) {
    UnitPlace places[kBlocks];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int own = step + block * kBlockUnits + own_unit(lane_);
      places[block] = units_.place_of(own, outer[block]);
      candidates[block] = __ballot_sync(kAllLanes, places[block].outer >= 0);
    }
    const auto* keys =
        static_cast<const Element*>(p_.keys.data) + key_head_ * p_.keys.stride_head + lane_ % 4 * 8;
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
      const int owner = lane_ / 4 * 4 + row % kRun;
      const int outer = __shfl_sync(kAllLanes, places[row / kRun].outer, owner);
      const int in_outer = __shfl_sync(kAllLanes, places[row / kRun].row, owner);
      load_row(row, keys + outer * p_.keys.stride_batch + in_outer * p_.keys.stride_row,
               outer >= 0);
    }
  }

  // Of a step of candidates only, which lie at equal distances.
  __device__ void load_all_keys(int step) {
    const int64_t stride = p_.keys.stride_row;
    const auto* key = static_cast<const Element*>(p_.keys.data) + batch_ * p_.keys.stride_batch +
                      key_head_ * p_.keys.stride_head + (step + unit_of(lane_, 0)) * stride +
                      lane_ % 4 * 8;
    const int64_t in_block = kNarrow ? 8 * stride : stride;
    const int64_t to_next_block = kNarrow ? in_block : (kBlockUnits - kRun + 1) * stride;
#pragma unroll
    for (int row = 0; row < 2 * kTiles; ++row) {
      load_row(row, key, true);
      key += row % kRun == kRun - 1 ? to_next_block : in_block;
    }
  }

  __device__ void load_row(int row, const Element* key, bool exists) {
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const auto* source =
            reinterpret_cast<const uint4*>(key + side * p_.keys_stride_bound + piece * 32);
        keys_[row][side][piece] = exists && piece_exists(piece) ? __ldcs(source) : no_piece();
      }
    }
  }

  __device__ void score_block(int first_unit, int block, unsigned candidates) {
    float scores[kRun][2];  // of this lane's columns
#pragma unroll
    for (int tile = 0; tile < kBlockTiles; ++tile) {
      const int row = block * kRun + 2 * tile;
      float sums[4];
#pragma unroll
      for (int side = 0; side < kSides; ++side) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          float products[4];
          multiply_pieces<Element>(keys_[row][side][piece], keys_[row + 1][side][piece],
                                   queries_[side][piece], products);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[i] = side == 0 && piece == 0 ? products[i] : sums[i] + products[i];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = kBounds ? sums[i] : max_nan(sums[i], least_);
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

  struct Max {
    // What a lane gives twice does not matter.
    static constexpr bool kIdempotent = true;
    static __device__ float empty() { return negative_infinity(); }
    static __device__ float of(float a, float b) { return max_nan(a, b); }
  };
  struct Sum {
    static constexpr bool kIdempotent = false;
    static __device__ float empty() { return 0.0f; }
    static __device__ float of(float a, float b) { return a + b; }
  };

  // Over the heads, of the lane's own row. kAll: every column is one, or with Max one of them again.
  template <class Reduce, bool kAll>
  __device__ float reduced_row(const float (&scores)[kRun][2]) const {
    const int heads = a_.plan.heads_per_key;
    const int period = column_period();
    float rows[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      float column[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        // Of a head that is there twice, the first.
        const bool exists = kAll || (j < period && ((lane_ % 4 * 2 + j) & (period - 1)) < heads);
        column[j] = exists ? scores[i][j] : Reduce::empty();
      }
      rows[i] = Reduce::of(column[0], column[1]);
    }
    return of_own_row(rows, [&](float x, float given, int distance) {
      if (!Reduce::kIdempotent && period <= 2 * distance) return x;
      return Reduce::of(x, __shfl_xor_sync(kAllLanes, given, distance));
    });
  }

  __device__ void store_reduced(int first_unit, unsigned candidates,
                                const float (&scores)[kRun][2]) {
    const bool all = a_.plan.heads_per_key == column_period();
    float score;
    if (p_.head_reduce == Reduction::kMax) {
      score = all ? reduced_row<Max, true>(scores) : reduced_row<Max, false>(scores);
    } else {
      const bool two = all && a_.plan.heads_per_key > 1;
      score = two ? reduced_row<Sum, true>(scores) : reduced_row<Sum, false>(scores);
      if (p_.head_reduce == Reduction::kMean) score /= static_cast<float>(a_.plan.heads_per_key);
    }
    const int lane = reread_lane_index();
    const int unit = first_unit + own_unit(lane);
    if (unit >= end_ || lane % 4 >= kRun) return;
    lines_[unit] = (candidates >> lane & 1) != 0 ? score : negative_infinity();
  }

  // add(own, given, distance): with what the lane at `distance` gives. Of two lanes each keeps half
  // of the rows and gives the others, so that row lane % kRun remains.
  template <class Add>
  static __device__ float of_own_row(const float (&rows)[kRun], Add&& add) {
    const int lane = reread_lane_index();
    const bool odd = (lane & 1) != 0;
    const bool upper = (lane & 2) != 0;
    float kept[kRun / 2];
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) {
      const float given = odd ? rows[2 * i] : rows[2 * i + 1];
      kept[i] = add(odd ? rows[2 * i + 1] : rows[2 * i], given, 1);
    }
    if constexpr (kRun == 2) return add(kept[0], kept[0], 2);
    return add(upper ? kept[kRun / 2 - 1] : kept[0], upper ? kept[0] : kept[kRun / 2 - 1], 2);
  }

  __device__ void store_columns(int first_unit, unsigned candidates, float (&scores)[kRun][2]) {
    const int lane = reread_lane_index();
    const int unit = first_unit + unit_of(lane, 0);
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
      if (!kNarrow && p_.units % kRun == 0 && unit + kRun <= end_) {
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
        const int at = unit_of(0, i);
        if (unit + at < end_) to[at] = scores[i][j];
      }
    }
  }

  const ProxyScoresArguments& a_;
  const ProxyScoresProblem& p_;
  int lane_;
  int key_head_;
  int batch_;
  ScoredUnits units_;
  SharedStorage& smem_;
  int first_, end_;  // units
  float* lines_;  // of the key head's scores
  uint4 queries_[kSides][kPieces];
  float least_;  // of an element
  float weight_[2];
  uint4 keys_[2 * kTiles][kSides][kPieces];
};

template <class Element, int kDim, bool kBounds>
__global__ void __launch_bounds__(kStreamThreads, kStreamCtasPerSm)
    stream_scores_kernel(const __grid_constant__ ProxyScoresArguments a) {
  using Stream = ScoreStream<Element, kDim, kBounds>;
  __shared__ typename Stream::SharedStorage smem;
  Stream(a, smem).run();
}

}  // namespace attnsieve::sm80
