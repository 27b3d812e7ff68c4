// What a warp of the sm_90 estimator has: codes of 64 sampled rows in registers, their factors and
// thresholds, and the maxima of a stage.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/sm80/estimate/order.cuh"
#include "cuda/sm90/estimate/arguments.h"
#include "cuda/sm90/estimate/config.h"

namespace attnsieve::sm90 {

using namespace cute;

// One warp's rows.
template <class Config>
class EstimateWarp {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Mma = typename Config::Mma;
  using Products = decltype(partition_fragment_C(Mma{}, Shape<_64, Int<Config::kTileKeys>>{}));
  static constexpr int32_t kUnseen = INT32_MIN;

  __device__ EstimateWarp(const EstimateArguments& a, SharedStorage& smem, int warp)
      : p_(a.problem),
        smem_(smem),
        warp_(warp),
        lane_(static_cast<int>(threadIdx.x) % kWarpThreads) {}

  __device__ void load_rows(int batch, int head, int row_set) {
    if (lane_ == 0) smem_.places[warp_] = {batch, head, row_set * Config::kBlocks};
    __syncwarp();
    const EstimateSequence& sequence = smem_.sequence;
    const float* scales = sequence.q_scales + head * p_.q.num_scales;
    const ScaleLayout layout = p_.q.layout();
#pragma unroll
    for (int m = lane_; m < Config::kWarpRows; m += kWarpThreads) {
      const int64_t row = row_of(m);
      float2 numbers = {0.0f, 0.0f};
      if (row < sequence.seqlen_q) {
        const int64_t scale = row / layout.rows * layout.scales +
                              layout.scale_of(p_.q.scale_rows, static_cast<int>(row % layout.rows));
        numbers.x = __fmul_rn(scales[scale], p_.softmax_scale);
        if (sequence.threshold != nullptr) {
          numbers.y =
              sequence.threshold[head * p_.threshold.stride_head + row * p_.threshold.stride_row];
        }
      }
      smem_.rows[warp_][m] = numbers;
    }
    __syncwarp();
    const char* codes = sequence.q_codes + head * p_.q.codes.stride_head;
    auto words = recast<uint32_t>(rows_);  // ((row half, column half), 1, fragment, step)
#pragma unroll
    for (int i = 0; i < Config::kFragments * 2; ++i) {
      const int fragment = i / 2;
      const int half = i % 2;
      const int64_t row = row_of(of_lane(lane_, fragment, half));
      const bool exists = row < sequence.seqlen_q;
      const char* from = codes + row * p_.q.codes.stride_row;
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        uint32_t low = 0;
        uint32_t high = 0;
        if (exists && p_.q.bits == 8) {
          low = *reinterpret_cast<const uint32_t*>(from + step * 32 + lane_ % 4 * 4);
          high = *reinterpret_cast<const uint32_t*>(from + step * 32 + 16 + lane_ % 4 * 4);
        } else if (exists) {
          const uint32_t both =
              *reinterpret_cast<const uint32_t*>(from + step * 16 + lane_ % 4 * 4);
          low = sm80::signed_codes(both >> 4);
          high = sm80::signed_codes(both);
        }
        words(make_coord(0, half, 0), 0, fragment, step) = low;
        words(make_coord(0, half, 1), 0, fragment, step) = high;
      }
    }
  }

  // Starts the product of a fragment and a tile of keys.
  __device__ void issue(Products& products, int fragment, int tile) const {
    Mma mma;
    const auto keys = make_tensor(make_smem_ptr(smem_.keys), typename Config::LayoutKeys{});
    const auto operand = mma.get_slice(threadIdx.x % 128).partition_fragment_B(keys);
    warpgroup_fence_operand(products);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      cute::gemm(mma, rows_(_, _, fragment, step), operand(_, _, step, tile), products);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  }

  // Takes the products of a fragment with a tile of keys. `slot`: of the ring.
  template <bool kMasked>
  __device__ void reduce(const Products& products, int fragment, int tile, int slot) {
    constexpr int kUnits = Config::kTileUnits;
    float2 numbers[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      numbers[half] = smem_.rows[warp_][of_lane(lane_, fragment, half)];
#pragma unroll
    for (int first = 0; first < kUnits; first += 4) {
      const float4 scales =
          *reinterpret_cast<const float4*>(&smem_.scales[slot][tile][lane_ % 4][first]);
      const float scale[4] = {scales.x, scales.y, scales.z, scales.w};
      int32_t best[4];
      int32_t below[4];  // of the lower eight rows, where those are a q-block of their own
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float upper = value_of<kMasked>(products, first + i, 0, scale[i], numbers[0]);
        const float lower = value_of<kMasked>(products, first + i, 1, scale[i], numbers[1]);
        if constexpr (Config::kBlockRows == 8) {
          best[i] = __reduce_max_sync(0xffffffffu, sm80::float_order(upper));
          below[i] = __reduce_max_sync(0xffffffffu, sm80::float_order(lower));
        } else {
          const int32_t both = sm80::float_order(max_nan(upper, lower));
          best[i] = __reduce_max_sync(0xffffffffu, both);
        }
      }
      const int unit = tile * kUnits + first;
      const int block = fragment * 16 / Config::kBlockRows;
      if (lane_ == 0) {
        keep(best, block, unit, fragment * 16 % Config::kBlockRows == 0);
        if constexpr (Config::kBlockRows == 8) keep(below, block + 1, unit, true);
      }
      asm volatile("" ::: "memory");  // four units at a time: more would spill
    }
  }

  // A tile of whose keys no row sees any.
  __device__ void skip(int tile) {
    for (int i = lane_; i < Config::kBlocks * Config::kTileUnits; i += kWarpThreads) {
      smem_
          .best[warp_][i / Config::kTileUnits][tile * Config::kTileUnits + i % Config::kTileUnits] =
          sm80::float_order(negative_infinity());
    }
  }

  // Writes the maxima of a stage's blocks: a lane has a KV block, of as many q-blocks as there are
  // lanes for.
  __device__ void store(int stage, bool seen) {
    __syncwarp();
    const EstimatePlace place = smem_.places[warp_];
    const int stage_blocks = Config::kStageKeys / p_.block_k;
    const int units = max(p_.block_k / Config::kUnitKeys, 1);
    const int columns = static_cast<int>(p_.num_k_blocks());
    const int first = stage * stage_blocks;
    const int own = lane_ % stage_blocks;
    const int column = first + own;
#pragma unroll 1
    for (int block = lane_ / stage_blocks; block - lane_ / stage_blocks < Config::kBlocks;
         block += kWarpThreads / stage_blocks) {
      const bool exists = column < columns && block < Config::kBlocks &&
                          place.first_block + block < p_.num_q_blocks();
      int32_t best = sm80::float_order(negative_infinity());
      if (exists && seen) {
        for (int u = 0; u < units; ++u) best = max(best, smem_.best[warp_][block][own * units + u]);
      }
      const int64_t line =
          (place.batch * p_.num_heads + place.head) * p_.num_q_blocks() + place.first_block + block;
      if (p_.scores != nullptr) {
        if (exists) p_.scores[line * columns + column] = sm80::from_order(best);
        continue;
      }
      const bool keep = exists && !(sm80::from_order(best) <= 0.0f);
      const uint32_t votes = __ballot_sync(0xffffffffu, keep) >> (lane_ - own);
      if (own != 0 || !exists) continue;
      const int shift = first % 32;
      uint32_t word = stage_blocks == 32 ? votes : votes & ((1u << stage_blocks) - 1);
      word = (shift == 0 ? 0 : smem_.words[warp_][block]) | word << shift;
      smem_.words[warp_][block] = word;
      const int next = first + stage_blocks;
      if (next % 32 == 0 || next >= columns)
        p_.bits[line * ((columns + 31) / 32) + first / 32] = word;
    }
    __syncwarp();
  }

 private:
  // Which of the warp's rows, and where in the sequence that is.
  static __device__ int of_lane(int lane, int fragment, int half) {
    return fragment * 16 + half * 8 + lane / 4;
  }
  __device__ int64_t row_of(int m) const {
    return (smem_.places[warp_].first_block + m / Config::kBlockRows) * int64_t{p_.block_q} +
           m % Config::kBlockRows * p_.row_stride;
  }

  // Maxima of four units, of a q-block's first rows or of others.
  __device__ void keep(const int32_t (&best)[4], int block, int unit, bool first) {
    auto& to = *reinterpret_cast<int4*>(&smem_.best[warp_][block][unit]);
    int4 own = {best[0], best[1], best[2], best[3]};
    if (!first) {
      const int4 before = to;
      own = {max(own.x, before.x), max(own.y, before.y), max(own.z, before.z),
             max(own.w, before.w)};
    }
    to = own;
  }

  // The greatest estimate of a lane's row with its keys of a unit.
  template <bool kMasked>
  static __device__ float value_of(const Products& products, int unit, int half, float scale,
                                   const float2& numbers) {
    int32_t greatest = kUnseen;
#pragma unroll
    for (int j = 0; j < Config::kUnitKeys / 8; ++j) {
      const int at = (unit * (Config::kUnitKeys / 8) + j) * 4 + half * 2;
      greatest = __vimax3_s32(greatest, products(at), products(at + 1));
    }
    const float factor = __fmul_rn(numbers.x, scale);
    const float value = __fsub_rn(__fmul_rn(static_cast<float>(greatest), factor), numbers.y);
    return kMasked && greatest == kUnseen ? negative_infinity() : value;
  }

 public:
  // Products of pairs that the mask hides. What the lane's rows see is found here, seldom, and not
  // kept through the loop.
  __device__ void hide(Products& products, int fragment, int64_t first) const {
    int lane = lane_;
    asm volatile("" : "+r"(lane));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row_of(of_lane(lane, fragment, half));
      const KeyRange keys = estimated_keys(p_, smem_.sequence, row, row + 1);
      // Relative to this lane's first key of the tile.
      const int64_t own = first + lane % 4 * 2;
      const int begin = static_cast<int>(min64(max64(keys.begin - own, 0), INT32_MAX));
      const int end = static_cast<int>(min64(max64(keys.end - own, 0), INT32_MAX));
#pragma unroll
      for (int i = 0; i < Config::kTileKeys / 4; ++i) {
        const int key = i / 2 * 8 + i % 2;
        if (key < begin || key >= end) products(i / 2 * 4 + half * 2 + i % 2) = kUnseen;
      }
    }
  }

 private:
  const EstimateProblem& p_;
  SharedStorage& smem_;
  int warp_;
  int lane_;
  decltype(make_tensor<int8_t>(
      Shape<Shape<_4, _2, _2>, _1, Int<Config::kFragments>, Int<Config::kSteps>>{})) rows_;
};

}  // namespace attnsieve::sm90
