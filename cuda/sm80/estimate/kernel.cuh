// Computes        for q-block a and KV block b of a head the greatest  dot(i, j) * ((q_scale(i) *
//                 softmax_scale) * k_scale(j)) - threshold(i)  over the sampled rows i of a and the
//                 keys j of b that i sees; or a bit, whether it is above 0; or the sum of the
//                 exponentials of these numbers (estimate.h).
// Roles           A CTA takes kRows sampled rows, which are one or more q-blocks of a head, and walks
//                 over the keys that they see; a warp owns kWarpRows of the rows, with their codes
//                 in registers. Last rows first.
// Shared memory   two tiles of kTileKeys keys with their scales (up to 64 KB), maxima of two tiles.
// Pipeline        keys of the next tile are on their way while a tile is scored; maxima of a tile
//                 are stored under the next one.
// Invariants      Maxima of integers come first and are exact; one product of scales then serves a
//                 lane's keys of a unit, because those share their scale. A warp leaves one number
//                 for each unit and q-block of its own, so nothing is shared until the tile is
//                 done. Floats are compared as integers of the same order, NaN above everything.
//                 Sums are added in one order, lanes by a butterfly, units and warps ascending.
// Not handled     head_dim other than 64, 96, 128, 256; keys with scales of fewer than 16 rows.
#pragma once

#include "attnsieve/estimate.h"
#include "cuda/common/numeric.cuh"
#include "cuda/common/ptx_sm80.cuh"
#include "cuda/sm80/estimate/config.h"
#include "cuda/sm80/estimate/mma.cuh"
#include "cuda/sm80/estimate/order.cuh"

namespace attnsieve::sm80 {

template <class Config>
class Estimator {
 public:
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int32_t kUnseen = INT32_MIN;
  static constexpr float kKeyScale = Config::kKeyBits == 4 ? kNibbleScale : 1.0f;
  static constexpr int kEighths = Config::kFragments * 2;  // of 8 rows, a row of a lane each

  __device__ Estimator(const EstimateProblem& p, SharedStorage& smem)
      : p_(p),
        smem_(smem),
        warp_(static_cast<int>(threadIdx.x) / kWarpThreads),
        lane_(static_cast<int>(threadIdx.x) % kWarpThreads),
        block_rows_(p.block_q / p.row_stride),
        blocks_(Config::kRows / block_rows_),
        shift_(p.q.bits == 4 ? 4 : 0) {}

  __device__ void run(int64_t item) {
    const int64_t row_tiles = (p_.num_q_blocks() + blocks_ - 1) / blocks_;
    const int64_t pair = item / row_tiles;
    first_block_ = (row_tiles - 1 - item % row_tiles) * blocks_;
    head_ = pair % p_.num_heads;
    batch_ = pair / p_.num_heads;
    if (threadIdx.x == 0) smem_.sequence = sequence_of(p_, batch_);
    __syncthreads();
    load_rows();
    const int64_t rows_begin = first_block_ * p_.block_q;
    const KeyRange keys =
        estimated_keys(p_, smem_.sequence, rows_begin, rows_begin + blocks_ * int64_t{p_.block_q});
    const int tiles = static_cast<int>((p_.num_keys() + Config::kTileKeys - 1) / Config::kTileKeys);
    int begin = 0;
    int end = 0;
    if (keys.begin < keys.end) {
      begin = static_cast<int>(keys.begin / Config::kTileKeys);
      end = static_cast<int>((keys.end + Config::kTileKeys - 1) / Config::kTileKeys);
    }
    for (int tile = 0; tile < begin; ++tile) store(tile, kNothing);
    if (begin < end) walk(begin, end);
    for (int tile = end; tile < tiles; ++tile) store(tile, kNothing);
  }

 private:
  static constexpr int kNothing = -1;  // in place of a stage: no row sees a key of the tile

  struct Pieces {  // of 4-bit codes on their way
    uint4 codes[Config::kKeyBits == 4 && Config::kPrefetch ? Config::kThreadPieces : 1];
  };

  // Of a lane, in a fragment of the warp.
  __device__ int64_t row_of(int lane, int fragment, int half) const {
    const int m = warp_ * Config::kWarpRows + fragment * 16 + half * 8 + lane / 4;
    return (first_block_ + m / block_rows_) * p_.block_q + m % block_rows_ * int64_t{p_.row_stride};
  }
  __device__ KeyRange keys_of(int64_t row) const {
    return estimated_keys(p_, smem_.sequence, row, row + 1);
  }

  // Codes, factors and thresholds of the warp's rows.
  __device__ void load_rows() {
    const char* codes = smem_.sequence.q_codes + head_ * p_.q.codes.stride_head;
    const float* scales = smem_.sequence.q_scales + head_ * p_.q.num_scales;
    const ScaleLayout layout = p_.q.layout();
#pragma unroll
    for (int i = 0; i < Config::kFragments * 2; ++i) {
      const int fragment = i / 2;
      const int half = i % 2;
      const int64_t row = row_of(lane_, fragment, half);
      const bool exists = row < smem_.sequence.seqlen_q;
      const KeyRange keys = keys_of(row);
      all_begin_ = max(all_begin_, static_cast<int>(min64(keys.begin, INT32_MAX)));
      all_end_ = min(all_end_, static_cast<int>(max64(keys.end, 0)));
      factor_[fragment][half] = 0.0f;
      threshold_[fragment][half] = 0.0f;
      if (exists) {
        const int64_t scale = row / layout.rows * layout.scales +
                              layout.scale_of(p_.q.scale_rows, static_cast<int>(row % layout.rows));
        factor_[fragment][half] = __fmul_rn(scales[scale], p_.softmax_scale);
        if (smem_.sequence.threshold != nullptr) {
          threshold_[fragment][half] =
              smem_.sequence
                  .threshold[head_ * p_.threshold.stride_head + row * p_.threshold.stride_row];
        }
      }
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
          low = upper_codes(both);
          high = lower_codes(both);
        }
        rows_[fragment][step][half] = low;
        rows_[fragment][step][half + 2] = high;
      }
    }
    all_begin_ = __reduce_max_sync(0xffffffffu, all_begin_);
    all_end_ = __reduce_min_sync(0xffffffffu, all_end_);
  }

  __device__ void walk(int begin, int end) {
    const int64_t kv_head = head_ / (p_.num_heads / p_.num_kv_heads);
    keys_ = smem_.sequence.k_codes + kv_head * p_.k.codes.stride_head;
    scales_ = smem_.sequence.k_scales + kv_head * p_.k.num_scales;
    Pieces pieces;
    start_load(begin, 0, pieces);
    finish_load(begin, 0, pieces);
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      const int stage = (tile - begin) % 2;
      cp_async_wait<0>();
      __syncthreads();
      if (tile + 1 < end) start_load(tile + 1, stage ^ 1, pieces);
      if (tile > begin) store(tile - 1, stage ^ 1);
      score(tile, stage);
      if (tile + 1 < end) finish_load(tile + 1, stage ^ 1, pieces);
    }
    __syncthreads();
    store(end - 1, (end - 1 - begin) % 2);
  }

  // Keys behind the end become zeros; no row sees them.
  __device__ void start_load(int tile, int stage, Pieces& pieces) {
    const int64_t first = int64_t{tile} * Config::kTileKeys;
    if constexpr (Config::kKeyBits == 8) {
#pragma unroll 4
      for (int i = 0; i < Config::kStageBytes / 16 / Config::kThreads; ++i) {
        const int piece = i * Config::kThreads + static_cast<int>(threadIdx.x);
        const int row = piece / Config::kChunks;
        const int chunk = piece % Config::kChunks;
        const bool exists = first + row < smem_.sequence.num_keys;
        const char* from = keys_ + (exists ? first + row : 0) * p_.k.codes.stride_row + chunk * 16;
        cp_async_16_or_zero(smem_.keys[stage] + Config::offset(row, chunk), from, exists);
      }
      cp_async_commit();
    } else if constexpr (Config::kPrefetch) {
#pragma unroll
      for (int i = 0; i < Config::kThreadPieces; ++i) pieces.codes[i] = load_piece(tile, i);
    }
    const ScaleLayout layout = p_.k.layout();
    const int scales = Config::kTileKeys / layout.rows * layout.scales;
    const int64_t scale = int64_t{tile} * scales + threadIdx.x;
    if (static_cast<int>(threadIdx.x) < scales)
      smem_.scales[stage][threadIdx.x] =
          scale < smem_.sequence.num_k_scales ? scales_[scale] * kKeyScale : 0.0f;
  }

  __device__ uint4 load_piece(int tile, int i) const {
    const int piece = i * Config::kThreads + static_cast<int>(threadIdx.x);
    const int64_t row = int64_t{tile} * Config::kTileKeys + piece / Config::kSteps;
    if (piece >= Config::kPieces || row >= smem_.sequence.num_keys) return {0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(keys_ + row * p_.k.codes.stride_row +
                                           piece % Config::kSteps * 16);
  }

  __device__ void finish_load(int tile, int stage, const Pieces& pieces) {
    if constexpr (Config::kKeyBits == 4) {
#pragma unroll
      for (int i = 0; i < Config::kThreadPieces; ++i) {
        const int piece = i * Config::kThreads + static_cast<int>(threadIdx.x);
        if (piece >= Config::kPieces) break;
        const int row = piece / Config::kSteps;
        const int chunk = piece % Config::kSteps * 2;
        const uint4 c = Config::kPrefetch ? pieces.codes[i] : load_piece(tile, i);
        *reinterpret_cast<uint4*>(smem_.keys[stage] + Config::offset(row, chunk)) = {
            upper_codes(c.x), upper_codes(c.y), upper_codes(c.z), upper_codes(c.w)};
        *reinterpret_cast<uint4*>(smem_.keys[stage] + Config::offset(row, chunk + 1)) = {
            lower_codes(c.x), lower_codes(c.y), lower_codes(c.z), lower_codes(c.w)};
      }
    }
  }

  // Scores of this warp's rows with a tile, a unit of its keys at a time.
  __device__ void score(int tile, int stage) {
    const int64_t first = int64_t{tile} * Config::kTileKeys;
    const bool masked = all_begin_ > first || all_end_ < first + Config::kTileKeys;
    const int row = lane_ / 16 * 8 + lane_ % 8;
#pragma unroll 1
    for (int unit = 0; unit < Config::kUnits; ++unit) {
      int32_t products[Config::kFragments][2][4] = {};
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        uint32_t keys[4];
        load_matrices(keys, smem_.keys[stage] + Config::offset(unit * Config::kUnitKeys + row,
                                                               step * 2 + lane_ / 8 % 2));
#pragma unroll
        for (int fragment = 0; fragment < Config::kFragments; ++fragment) {
          mma_s8(products[fragment][0], rows_[fragment][step], keys[0], keys[1]);
          mma_s8(products[fragment][1], rows_[fragment][step], keys[2], keys[3]);
        }
      }
      if (masked) hide(first + unit * Config::kUnitKeys, products);
      if constexpr (Config::kSum) {
        add(unit, stage, products);
      } else {
        reduce(unit, stage, products);
      }
    }
  }

  // Products of pairs that the mask hides. What the lane's rows see is found here, seldom, and not
  // kept through the loop.
  __device__ void hide(int64_t first, int32_t (&products)[Config::kFragments][2][4]) const {
    int lane = lane_;
    asm volatile("" : "+r"(lane));
#pragma unroll
    for (int i = 0; i < Config::kFragments * 2; ++i) {
      const KeyRange keys = keys_of(row_of(lane, i / 2, i % 2));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t key = first + j / 2 * 8 + lane_ % 4 * 2 + j % 2;
        if (key < keys.begin || key >= keys.end)
          products[i / 2][j / 2][i % 2 * 2 + j % 2] = kUnseen;
      }
    }
  }

  __device__ float value_of(int32_t product, int eighth, float scale) const {
    const float factor = __fmul_rn(factor_[eighth / 2][eighth % 2], scale);
    return __fsub_rn(__fmul_rn(static_cast<float>(product >> shift_), factor),
                     threshold_[eighth / 2][eighth % 2]);
  }

  // The greatest of a unit, for each q-block of the warp.
  __device__ void reduce(int unit, int stage, const int32_t (&products)[Config::kFragments][2][4]) {
    int32_t best[kEighths];
    const float scale = smem_.scales[stage][scale_of(unit)];
#pragma unroll
    for (int i = 0; i < kEighths; ++i) {
      const auto& own = products[i / 2];
      const int c = i % 2 * 2;
      const int32_t greatest =
          max(__vimax3_s32(own[0][c], own[0][c + 1], own[1][c]), own[1][c + 1]);
      best[i] =
          float_order(greatest == kUnseen ? negative_infinity() : value_of(greatest, i, scale));
    }
    const int eighths = block_eighths([&](int i, int j) { best[i] = max(best[i], best[j]); });
#pragma unroll
    for (int i = 0; i < kEighths; ++i) {
      if (i % eighths != 0) continue;
      const int32_t greatest = __reduce_max_sync(0xffffffffu, best[i]);
      if (lane_ == 0) smem_.best[stage][warp_][i / eighths][unit] = greatest;
    }
  }

  // The sum of a unit's exponentials, for each q-block of the warp.
  __device__ void add(int unit, int stage, const int32_t (&products)[Config::kFragments][2][4]) {
    float sums[kEighths];
    const float scale = smem_.scales[stage][scale_of(unit)];
#pragma unroll
    for (int i = 0; i < kEighths; ++i) {
      sums[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int32_t product = products[i / 2][j / 2][i % 2 * 2 + j % 2];
        if (product != kUnseen) sums[i] += expf(value_of(product, i, scale));
      }
    }
    const int eighths = block_eighths([&](int i, int j) { sums[i] += sums[j]; });
#pragma unroll
    for (int i = 0; i < kEighths; ++i) {
      if (i % eighths != 0) continue;
#pragma unroll
      for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
      if (lane_ == 0) smem_.best[stage][warp_][i / eighths][unit] = __float_as_int(sums[i]);
    }
  }

  // Joins what a lane has of a q-block into the first of its eighths; how many those are.
  template <class Join>
  __device__ int block_eighths(Join&& join) const {
    const int eighths = min(block_rows_ / 8, kEighths);
#pragma unroll
    for (int width = 1; width < kEighths; width *= 2) {
      if (eighths <= width) continue;
#pragma unroll
      for (int i = 0; i < kEighths; i += 2 * width) join(i, i + width);
    }
    return eighths;
  }

  // Of a unit of the tile: which of its scales this lane's keys have.
  __device__ int scale_of(int unit) const {
    if (p_.k.scale_rows == ScaleRows::kKeyQuads) return unit / 2 * 4 + lane_ % 4;
    return unit * Config::kUnitKeys / p_.k.block_rows;
  }

  // Writes the maxima of a tile's blocks: a lane has a unit of a q-block, four q-blocks at a time.
  __device__ void store(int tile, int stage) {
    const int units = p_.block_k / Config::kUnitKeys;
    const int tile_blocks = Config::kUnits / units;
    const int64_t columns = p_.num_k_blocks();
    const int unit = lane_ % Config::kUnits;
    const int64_t column = int64_t{tile} * tile_blocks + unit / units;
#pragma unroll 1
    for (int first = warp_ * 4; first < blocks_; first += Config::kWarps * 4) {
      const int block = first + lane_ / Config::kUnits;
      const bool exists = block < blocks_ && first_block_ + block < p_.num_q_blocks();
      int32_t best =
          exists && stage != kNothing ? best_of(stage, block, unit) : nothing<Config::kSum>();
      for (int distance = 1; distance < units; distance *= 2)
        best = joined<Config::kSum>(best, __shfl_xor_sync(0xffffffffu, best, distance));
      const int64_t line =
          (batch_ * p_.num_heads + head_) * p_.num_q_blocks() + first_block_ + block;
      const bool leads = unit % units == 0 && column < columns;
      if (p_.scores != nullptr) {
        if (exists && leads)
          p_.scores[line * columns + column] =
              Config::kSum ? __int_as_float(best) : from_order(best);
        continue;
      }
      const bool keep = leads && !(from_order(best) <= 0.0f);
      const uint32_t votes = __ballot_sync(0xffffffffu, keep);
      if (exists && unit == 0) {
        const uint32_t own = votes >> (lane_ / Config::kUnits * Config::kUnits);
        add_bits(block, line, int64_t{tile} * tile_blocks, tile_blocks, units, own);
      }
    }
  }

  // Bits of a tile's blocks, `units` apart, behind those of the tiles before.
  __device__ void add_bits(int block, int64_t line, int64_t column, int tile_blocks, int units,
                           uint32_t votes) {
    const int64_t columns = p_.num_k_blocks();
    uint32_t word = column % 32 == 0 ? 0 : smem_.words[block];
    for (int i = 0; i < tile_blocks; ++i) word |= (votes >> (i * units) & 1u) << (column % 32 + i);
    smem_.words[block] = word;
    const int64_t next = column + tile_blocks;
    if (next % 32 == 0 || next >= columns)
      p_.bits[line * ((columns + 31) / 32) + column / 32] = word;
  }

  // Of a q-block, which one or several warps have.
  __device__ int32_t best_of(int stage, int block, int unit) const {
    const int row = block * block_rows_;
    int32_t best =
        smem_.best[stage][row / Config::kWarpRows][row % Config::kWarpRows / block_rows_][unit];
    for (int other = Config::kWarpRows; other < block_rows_; other += Config::kWarpRows)
      best =
          joined<Config::kSum>(best, smem_.best[stage][(row + other) / Config::kWarpRows][0][unit]);
    return best;
  }

  const EstimateProblem& p_;
  SharedStorage& smem_;
  int warp_;
  int lane_;
  int block_rows_;  // sampled rows of a q-block
  int blocks_;  // q-blocks of the CTA
  int shift_;  // of products, as codes of queries in upper halves of bytes count 16 times
  int64_t batch_ = 0;
  int64_t head_ = 0;
  int64_t first_block_ = 0;
  const char* keys_ = nullptr;
  const float* scales_ = nullptr;
  uint32_t rows_[Config::kFragments][Config::kSteps][4];  // A of the MMAs
  float factor_[Config::kFragments][2];
  float threshold_[Config::kFragments][2];
  int all_begin_ = 0;  // keys that every row of the warp sees
  int all_end_ = INT32_MAX;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    estimate_block_scores_kernel(const __grid_constant__ EstimateProblem problem) {
  extern __shared__ __align__(128) unsigned char storage[];
  Estimator<Config>(problem, *reinterpret_cast<typename Config::SharedStorage*>(storage))
      .run(blockIdx.x);
}

}  // namespace attnsieve::sm80
