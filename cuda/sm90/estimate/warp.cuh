// What a warp of the sm_90 estimator has: codes of 64 sampled rows in registers, their factors and
// thresholds and the maxima of some stages in shared memory.
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

  // Says where the rows are and their results belong.
  __device__ void place(int batch, int head, int row_set) {
    if (lane_ == 0) {
      const int first_block = row_set * Config::kBlocks;
      const int64_t line = (batch * p_.num_heads + head) * p_.num_q_blocks() + first_block;
      EstimatePlace& to = smem_.places[warp_];
      to.first_block = first_block;
      to.num_blocks =
          static_cast<int>(max64(min64(p_.num_q_blocks() - first_block, Config::kBlocks), 0));
      to.columns = static_cast<int>(p_.num_k_blocks());
      to.stage_shift = __ffs(Config::kStageKeys) - __ffs(p_.block_k);
      to.block_units = max(p_.block_k / Config::kUnitKeys, 1);
      to.scores = p_.scores == nullptr ? nullptr : p_.scores + line * to.columns;
      to.bits = p_.bits == nullptr ? nullptr : p_.bits + line * ((to.columns + 31) / 32);
    }
    if (lane_ < Config::kBlocks) smem_.words[warp_][lane_] = 0;
    __syncwarp();
  }

  // Codes, factors and thresholds of the rows.
  __device__ __forceinline__ void load_rows(int head) {
    const EstimateSequence& sequence = smem_.sequence;
    const float* scales = sequence.q_scales + head * p_.q.num_scales;
    const ScaleLayout layout = p_.q.layout();
    const char* codes = sequence.q_codes + head * p_.q.codes.stride_head;
    auto words = recast<uint32_t>(rows_);  // ((row half, column half), 1, fragment, step)
#pragma unroll
    for (int i = 0; i < Config::kFragments * 2; ++i) {
      const int fragment = i / 2;
      const int half = i % 2;
      const int64_t row = row_of(of_lane(lane_, fragment, half));
      const bool exists = row < sequence.seqlen_q;
      float2 numbers = {0.0f, 0.0f};
      if (exists) {
        const auto number = static_cast<uint32_t>(row);
        const auto chunk = static_cast<uint32_t>(layout.rows);
        const int64_t scale = int64_t{number / chunk} * layout.scales +
                              layout.scale_of(p_.q.scale_rows, static_cast<int>(number % chunk));
        numbers.x = __fmul_rn(scales[scale], p_.softmax_scale);
        if (sequence.threshold != nullptr) {
          numbers.y =
              sequence.threshold[head * p_.threshold.stride_head + row * p_.threshold.stride_row];
          if (p_.bits != nullptr) numbers.y = bit_threshold(numbers.y);
        }
      }
      if (lane_ % 4 == 0)
        reinterpret_cast<float2*>(&smem_.rows[warp_][fragment][lane_ / 4])[half] = numbers;
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
    __syncwarp();
  }

  // Factors and thresholds of a lane's two rows of a fragment.
  __device__ __forceinline__ void load_numbers(int fragment) {
    const float4 both = smem_.rows[warp_][fragment][lane_ / 4];
    numbers_[0] = {both.x, both.y};
    numbers_[1] = {both.z, both.w};
  }

  // Starts the product of a fragment and a tile of keys.
  __device__ __forceinline__ void issue(Products& products, int fragment, int tile) const {
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

  // Scales of the lane's keys of a tile. `slot`: of the ring.
  __device__ __forceinline__ void load_scales(int tile, int slot) {
    using Few = std::conditional_t<Config::kTileUnits == 2, float2, float4>;
    *reinterpret_cast<Few*>(scales_) =
        *reinterpret_cast<const Few*>(&smem_.scales[slot][tile][lane_ % 4][0]);
  }

  // Takes the products of a fragment with a tile of keys, after load_scales() and load_numbers().
  // `unit`: the stage's first, of those stored together.
  template <bool kMasked, bool kBits>
  __device__ __forceinline__ void reduce(const Products& products, int fragment, int unit,
                                         int tile) {
    if constexpr (kBits) {
      reduce_bits<kMasked>(products, fragment, unit / Config::kTileUnits + tile);
    } else {
      reduce_maxima<kMasked>(products, fragment, unit + tile * Config::kTileUnits);
    }
  }

  // A tile of whose keys no row sees any.
  template <bool kBits>
  __device__ void skip(int unit, int tile) {
    constexpr int kUnits = kBits ? 1 : Config::kTileUnits;
    for (int i = lane_; i < Config::kBlocks * kUnits; i += kWarpThreads) {
      if constexpr (kBits) {
        smem_.marks[warp_][i][unit / Config::kTileUnits + tile] = 0;
      } else {
        smem_.best[warp_][i / kUnits][unit + tile * kUnits + i % kUnits] =
            sm80::float_order(negative_infinity());
      }
    }
  }

  // Writes the results of the stages [begin, end), of kStoreStages that are stored together: a lane
  // has a KV block. Bits: words that are complete.
  template <bool kBits>
  __device__ void store(int begin, int end) {
    __syncwarp();
    const EstimatePlace& place = smem_.places[warp_];
    const int shift = place.stage_shift;
    const int first = (begin & -Config::kStoreStages) << shift;
    const int columns = min(place.columns, end << shift);
#pragma unroll 1
    for (int block = 0; block < place.num_blocks; ++block) {
#pragma unroll 1
      for (int some = first & -32; some < columns; some += kWarpThreads) {
        const int column = some + lane_;
        const bool exists = column >= (begin << shift) && column < columns;
        const int unit = (column - first) * place.block_units;
        if constexpr (kBits) {
          bool marked = false;
          for (int u = unit; exists && u < unit + place.block_units; u += Config::kTileUnits) {
            const uint32_t own =
                smem_.marks[warp_][block][u / Config::kTileUnits] >> u % Config::kTileUnits;
            marked |= (own & ((1u << place.block_units) - 1)) != 0;
          }
          const uint32_t votes = __ballot_sync(0xffffffffu, marked);
          if (lane_ != 0) continue;
          uint32_t& word = smem_.words[warp_][block];
          word |= votes;
          if (some + 32 > end << shift) continue;
          place.bits[block * ((place.columns + 31) / 32) + some / 32] = word;
          word = 0;
        } else if (exists) {
          const int32_t* from = &smem_.best[warp_][block][unit];
          int32_t best = from[0];
          for (int u = 1; u < place.block_units; ++u) best = max(best, from[u]);
          place.scores[int64_t{block} * place.columns + column] = sm80::from_order(best);
        }
      }
    }
    __syncwarp();
  }

  // Writes what store() did not, after the stages [begin, end).
  template <bool kBits>
  __device__ void finish(int begin, int end) const {
    const EstimatePlace& place = smem_.places[warp_];
    begin <<= place.stage_shift;
    end <<= place.stage_shift;
#pragma unroll 1
    for (int64_t block = 0; block < place.num_blocks; ++block) {
      if constexpr (kBits) {
        const int words = (place.columns + 31) / 32;
        for (int i = lane_; i < words; i += kWarpThreads) {
          if (i >= begin / 32 && i < end / 32) continue;
          const bool begun = i == end / 32 && begin < end;
          place.bits[block * words + i] = begun ? smem_.words[warp_][block] : 0;
        }
      } else {
        for (int i = lane_; i < place.columns; i += kWarpThreads) {
          if (i < begin || i >= end) place.scores[block * place.columns + i] = negative_infinity();
        }
      }
    }
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

  // `unit`: of those stored together.
  template <bool kMasked>
  __device__ __forceinline__ void reduce_maxima(const Products& products, int fragment, int unit) {
    constexpr int kUnits = Config::kTileUnits;
    const bool first = fragment * 16 % Config::kBlockRows == 0;
    const bool last = (fragment + 1) * 16 % Config::kBlockRows == 0;
    float below[kUnits];  // of the lower eight rows, where those are a q-block of their own
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const float upper = value_of<kMasked>(products, u, 0, numbers_[0]);
      const float lower = value_of<kMasked>(products, u, 1, numbers_[1]);
      if constexpr (Config::kBlockRows == 8) {
        best_[u] = upper;
        below[u] = lower;
      } else {
        const float both = max_nan(upper, lower);
        best_[u] = first || kMasked ? both : max_nan(best_[u], both);
      }
    }
    const int block = fragment * 16 / Config::kBlockRows;
    if constexpr (Config::kBlockRows == 8) {
      store_maxima(best_, block, unit, true);
      store_maxima(below, block + 1, unit, true);
    } else if constexpr (kMasked) {
      store_maxima(best_, block, unit, first);  // at once: masked products need many registers
    } else if (last) {
      store_maxima(best_, block, unit, true);
    }
  }

  // The same for bits. `tile`: of those stored together.
  template <bool kMasked>
  __device__ __forceinline__ void reduce_bits(const Products& products, int fragment, int tile) {
    constexpr int kUnits = Config::kTileUnits;
    const bool first = fragment * 16 % Config::kBlockRows == 0;
    const bool last = (fragment + 1) * 16 % Config::kBlockRows == 0;
    bool below[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const bool upper = passes<kMasked>(products, u, 0, numbers_[0]);
      const bool lower = passes<kMasked>(products, u, 1, numbers_[1]);
      if constexpr (Config::kBlockRows == 8) {
        passed_[u] = upper;
        below[u] = lower;
      } else {
        passed_[u] = upper || lower || (!first && !kMasked && passed_[u]);
      }
    }
    const int block = fragment * 16 / Config::kBlockRows;
    if constexpr (Config::kBlockRows == 8) {
      store_marks(passed_, block, tile, true);
      store_marks(below, block + 1, tile, true);
    } else if constexpr (kMasked) {
      store_marks(passed_, block, tile, first);
    } else if (last) {
      store_marks(passed_, block, tile, true);
    }
  }

  // The marks of a q-block's units in a tile, those that pass in some lane; of its first rows or of
  // more.
  __device__ __forceinline__ void store_marks(const bool (&passed)[Config::kTileUnits], int block,
                                              int tile, bool first) {
    uint32_t marks = 0;
#pragma unroll
    for (int u = 0; u < Config::kTileUnits; ++u)
      marks |= __any_sync(0xffffffffu, passed[u]) ? 1u << u : 0u;
    if (lane_ != 0) return;
    uint32_t& to = smem_.marks[warp_][block][tile];
    to = first ? marks : to | marks;
  }

  // The maxima of a q-block's units in a tile, over the warp's lanes; of its first rows or of more.
  __device__ __forceinline__ void store_maxima(const float (&best)[Config::kTileUnits], int block,
                                               int unit, bool first) {
    int32_t maxima[Config::kTileUnits];
#pragma unroll
    for (int u = 0; u < Config::kTileUnits; ++u)
      maxima[u] = __reduce_max_sync(0xffffffffu, sm80::float_order(best[u]));
    if (lane_ != 0) return;
    int32_t* to = &smem_.best[warp_][block][unit];
#pragma unroll
    for (int u = 0; u < Config::kTileUnits; u += 2) {
      auto& two = *reinterpret_cast<int2*>(to + u);
      two = first ? int2{maxima[u], maxima[u + 1]}
                  : int2{max(two.x, maxima[u]), max(two.y, maxima[u + 1])};
    }
  }

  // The greatest product of a lane's row with its keys of a unit.
  __device__ __forceinline__ int32_t greatest_of(const Products& products, int unit,
                                                 int half) const {
    constexpr int kPairs = Config::kUnitKeys / 8;
    const auto at = [&](int i) { return products((unit * kPairs + i / 2) * 4 + half * 2 + i % 2); };
    if constexpr (kPairs == 4) {
      const int32_t first = __vimax3_s32(at(0), at(1), at(2));
      const int32_t second = __vimax3_s32(at(3), at(4), at(5));
      return max(__vimax3_s32(first, second, at(6)), at(7));
    }
    return max(__vimax3_s32(at(0), at(1), at(2)), at(3));
  }

  // The greatest estimate, less the row's threshold.
  template <bool kMasked>
  __device__ __forceinline__ float value_of(const Products& products, int unit, int half,
                                            float2 numbers) const {
    const int32_t greatest = greatest_of(products, unit, half);
    const float factor = __fmul_rn(numbers.x, scales_[unit]);
    const float value = __fsub_rn(__fmul_rn(static_cast<float>(greatest), factor), numbers.y);
    return kMasked && greatest == kUnseen ? negative_infinity() : value;
  }

  // Whether that is above 0 or NaN. A difference of finite numbers is above 0 where the first is
  // the greater one; bit_threshold() sees to the others.
  template <bool kMasked>
  __device__ __forceinline__ bool passes(const Products& products, int unit, int half,
                                         float2 numbers) const {
    const int32_t greatest = greatest_of(products, unit, half);
    const float factor = __fmul_rn(numbers.x, scales_[unit]);
    const bool above = !(__fmul_rn(static_cast<float>(greatest), factor) <= numbers.y);
    return above && !(kMasked && greatest == kUnseen);
  }

  // What an estimate is compared with where its difference to a threshold would be: an infinite one
  // exceeds +inf (NaN), and all exceed -inf.
  static __device__ float bit_threshold(float threshold) {
    if (threshold == negative_infinity()) return __int_as_float(0x7fc00000);
    return threshold == -negative_infinity() ? __int_as_float(0x7f7fffff) : threshold;
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
  float2 numbers_[2];                 // factors and thresholds of the lane's rows of a fragment
  alignas(16) float scales_[Config::kTileUnits];  // of the lane's keys of a tile
  float best_[Config::kTileUnits];    // of the lane's rows of a q-block with these
  bool passed_[Config::kTileUnits];   // the same of bits
  decltype(make_tensor<int8_t>(
      Shape<Shape<_4, _2, _2>, _1, Int<Config::kFragments>, Int<Config::kSteps>>{})) rows_;
};

}  // namespace attnsieve::sm90
