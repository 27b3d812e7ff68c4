// Computes        mean[b, h, :] of the finite numbers of x[b, h, :, :]; for y = x - mean and the
//                 rows that share a scale, magnitude = max |y|, codes = round(y * largest /
//                 magnitude), scales = magnitude / largest (estimate.h).
// Roles           sum_rows_kernel: a CTA adds kSumRows rows, lane i of kSumLanes rows i, i +
//                 kSumLanes ...; a thread owns 8 columns. Launched once a level.
//                 quantize_blocks_kernel: a CTA owns kQuantizeRows rows, reads them twice where
//                 rows share a scale. Writes y too, where asked for.
// Shared memory   sums of the lanes; a magnitude and a factor for each scale of the tile.
// Invariants      Every float32 operation is one of the CPU's, in its order; maxima have none.
// Not handled     head_dim that is not a multiple of 8, or above 256.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/sm80/quantize/arguments.h"

namespace attnsieve::sm80 {

inline constexpr int kThreadColumns = 8;
inline constexpr int kMaxRowThreads = 256 / kThreadColumns;
inline constexpr int kQuantizeRows = 128;  // of a CTA
inline constexpr int kQuantizeThreads = 256;

// A chunk of `rows` rows, of those of its sequence.
struct ChunkPlace {
  int64_t batch;
  int64_t chunk;
  KeyRange sequence;  // rows of the tensor
};

// The chunk in `slot` of packed_chunks(); a batched tensor is taken as its sequences one after the
// other. The chunk may lie behind the end of its sequence.
__device__ inline ChunkPlace place_of_slot(const QuantizeProblem& p, int64_t slot, int64_t rows) {
  const auto begin_of = [&](int64_t b) {
    return p.cu_seqlens == nullptr ? b * p.seqlen : sequence_rows(p, b).begin;
  };
  int64_t batch = 0;
  int64_t end = p.batch;  // of the sequences that may hold the slot
  while (end - batch > 1) {
    const int64_t middle = (batch + end) / 2;
    if (first_chunk(middle, begin_of(middle), rows) <= slot) {
      batch = middle;
    } else {
      end = middle;
    }
  }
  return {batch, slot - first_chunk(batch, begin_of(batch), rows), sequence_rows(p, batch)};
}

__device__ inline int64_t slot_of(const QuantizeProblem& p, const ChunkPlace& place, int64_t rows) {
  const int64_t begin = p.cu_seqlens == nullptr ? place.batch * p.seqlen : place.sequence.begin;
  return first_chunk(place.batch, begin, rows);
}

__device__ __forceinline__ void load_columns(const float* from, float (&x)[kThreadColumns]) {
  const float4 low = *reinterpret_cast<const float4*>(from);
  const float4 high = *reinterpret_cast<const float4*>(from + 4);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
template <class Element>
__device__ __forceinline__ void load_columns(const Element* from, float (&x)[kThreadColumns]) {
  alignas(16) Element elements[kThreadColumns];
  *reinterpret_cast<uint4*>(elements) = *reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < kThreadColumns; ++i) x[i] = to_float(elements[i]);
}

// Row `row` of a sequence of x.
template <class Element>
__device__ __forceinline__ const Element* row_of(const QuantizeProblem& p, const ChunkPlace& place,
                                                 int64_t head, int64_t row) {
  return static_cast<const Element*>(p.x.data) + place.batch * p.x.stride_batch +
         head * p.x.stride_head + (place.sequence.begin + row) * p.x.stride_row;
}

template <class Element, bool kFirst>
__global__ void __launch_bounds__(kSumLanes* kMaxRowThreads)
    sum_rows_kernel(const __grid_constant__ SumRowsArguments a) {
  __shared__ float lane_sums[kSumLanes][kMaxRowThreads * kThreadColumns];
  const QuantizeProblem& p = a.problem;
  const int64_t slots = packed_chunks(p.batch, p.total_rows(), a.unit * kSumRows);
  const int64_t head = blockIdx.x / slots;
  const ChunkPlace place = place_of_slot(p, blockIdx.x % slots, a.unit * kSumRows);
  const int64_t rows = place.sequence.end - place.sequence.begin;
  const int64_t units = (rows + a.unit - 1) / a.unit;  // rows of the source
  const int64_t first = place.chunk * kSumRows;
  if (place.chunk < 0 || (first >= units && place.chunk > 0)) return;
  const int count = static_cast<int>(min64(kSumRows, units - first));
  const int threads_of_row = static_cast<int>(p.head_dim) / kThreadColumns;
  const int lane = static_cast<int>(threadIdx.x) / threads_of_row;
  const int column = static_cast<int>(threadIdx.x) % threads_of_row * kThreadColumns;

  float sum[kThreadColumns] = {};
#pragma unroll
  for (int i = 0; i < kSumRows / kSumLanes; ++i) {
    const int row = lane + i * kSumLanes;
    if (row >= count) continue;
    float x[kThreadColumns];
    if constexpr (kFirst) {
      load_columns(row_of<Element>(p, place, head, first + row) + column, x);
    } else {
      const int64_t source_slots = packed_chunks(p.batch, p.total_rows(), a.unit);
      const int64_t line = head * source_slots + slot_of(p, place, a.unit) + first + row;
      load_columns(a.source + line * p.head_dim + column, x);
    }
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) sum[c] += kFirst && !isfinite(x[c]) ? 0.0f : x[c];
  }
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) lane_sums[lane][column + c] = sum[c];
  __syncthreads();
  for (int d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    float total = lane_sums[0][d];
#pragma unroll
    for (int i = 1; i < kSumLanes; ++i) total += lane_sums[i][d];
    if (a.sums != nullptr) {
      a.sums[(head * slots + blockIdx.x % slots) * p.head_dim + d] = total;
    } else {
      p.mean[(place.batch * p.num_heads + head) * p.head_dim + d] =
          rows == 0 ? 0.0f : __fdiv_rn(total, static_cast<float>(rows));
    }
  }
}

// 8 codes of a row, a byte each.
__device__ __forceinline__ uint2 codes_of(const float (&y)[kThreadColumns], float factor) {
  uint32_t words[2] = {};
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    const int code = factor == 0.0f ? 0 : __float2int_rn(__fmul_rn(y[c], factor));
    words[c / 4] |= (static_cast<uint32_t>(code) & 0xffu) << (c % 4 * 8);
  }
  return {words[0], words[1]};
}

template <class Element>
class TileQuantizer {
 public:
  struct SharedStorage {
    int32_t magnitudes[kQuantizeRows];  // bits of the greatest |y|
    float factors[kQuantizeRows];
  };

  __device__ TileQuantizer(const QuantizeProblem& p, SharedStorage& smem)
      : p_(p),
        smem_(smem),
        layout_(scale_layout(p.scale_rows, p.block_rows)),
        threads_of_row_(static_cast<int>(p.head_dim) / kThreadColumns),
        first_row_(static_cast<int>(threadIdx.x) / threads_of_row_),
        column_(static_cast<int>(threadIdx.x) % threads_of_row_ * kThreadColumns) {}

  __device__ void run(int64_t item) {
    const int64_t slots = packed_chunks(p_.batch, p_.total_rows(), kQuantizeRows);
    head_ = item / slots;
    place_ = place_of_slot(p_, item % slots, kQuantizeRows);
    const int64_t rows = place_.sequence.end - place_.sequence.begin;
    const int64_t begin = place_.chunk * kQuantizeRows;
    if (begin < 0 || begin >= rows) return;
    count_ = static_cast<int>(min64(kQuantizeRows, rows - begin));
    for (int i = threadIdx.x; i < kQuantizeRows; i += kQuantizeThreads) smem_.magnitudes[i] = 0;
    load_mean();
    // Threads of a row that one warp holds.
    mates_ = __match_any_sync(0xffffffffu, first_row_);
    float* const scales = tile_scales();
    if (layout_.rows == 1 && kWarpThreads % threads_of_row_ == 0) {  // a warp has all of a row
      for_each_row([&](int row, const float (&y)[kThreadColumns]) {
        const float2 scale = scale_of_magnitude(magnitude_of(y));
        if (is_first_mate()) scales[row] = scale.y;
        store_row(row, y, scale.x);
      });
      return;
    }
    __syncthreads();
    for_each_row([&](int row, const float (&y)[kThreadColumns]) {
      const int32_t greatest = magnitude_of(y);
      if (is_first_mate()) atomicMax(&smem_.magnitudes[scale_of(row)], greatest);
    });
    __syncthreads();
    const int used = (count_ + layout_.rows - 1) / layout_.rows * layout_.scales;
    for (int i = threadIdx.x; i < used; i += kQuantizeThreads) {
      const float2 scale = scale_of_magnitude(smem_.magnitudes[i]);
      smem_.factors[i] = scale.x;
      scales[i] = scale.y;
    }
    __syncthreads();
    for_each_row([&](int row, const float (&y)[kThreadColumns]) {
      store_row(row, y, smem_.factors[scale_of(row)]);
    });
  }

 private:
  __device__ bool is_first_mate() const {
    return __ffs(static_cast<int>(mates_)) - 1 == static_cast<int>(threadIdx.x) % kWarpThreads;
  }
  __device__ int scale_of(int row) const {
    return row / layout_.rows * layout_.scales +
           layout_.scale_of(p_.scale_rows, row % layout_.rows);
  }

  __device__ void load_mean() {
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) mean_[c] = 0.0f;
    if (p_.mean == nullptr) return;
    const int64_t line = place_.batch * p_.num_heads + head_;
    load_columns(p_.mean + line * p_.head_dim + column_, mean_);
  }

  // f(row of the tile, 8 columns of y) over this thread's rows.
  template <class F>
  __device__ void for_each_row(F&& f) const {
    const int rows_at_once = kQuantizeThreads / threads_of_row_;
    if (first_row_ >= rows_at_once) return;
    for (int row = first_row_; row < count_; row += rows_at_once) {
      float y[kThreadColumns];
      load_columns(row_of<Element>(p_, place_, head_, place_.chunk * kQuantizeRows + row) + column_,
                   y);
      if (p_.mean != nullptr) {
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) y[c] = __fsub_rn(y[c], mean_[c]);
      }
      f(row, y);
    }
  }

  // Bits of the greatest |y| of the mates.
  __device__ int32_t magnitude_of(const float (&y)[kThreadColumns]) const {
    int32_t greatest = 0;
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c)
      greatest = max(greatest, __float_as_int(y[c]) & 0x7fffffff);
    return __reduce_max_sync(mates_, greatest);
  }

  // The factor of numbers and the scale of codes.
  __device__ float2 scale_of_magnitude(int32_t bits) const {
    const float magnitude = __int_as_float(bits);
    const float largest = static_cast<float>(largest_code(p_.bits));
    if (!isfinite(magnitude)) return {0.0f, __int_as_float(0x7fc00000)};
    if (magnitude < kSmallestMagnitude) return {0.0f, 0.0f};
    return {__fdiv_rn(largest, magnitude), __fdiv_rn(magnitude, largest)};
  }

  // Where the scales of the tile's rows belong.
  __device__ float* tile_scales() const {
    const bool packed = p_.cu_seqlens != nullptr;
    const int64_t line = packed ? head_ : place_.batch * p_.num_heads + head_;
    const int64_t first = packed ? slot_of(p_, place_, layout_.rows) : 0;
    const int64_t chunk = first + place_.chunk * (kQuantizeRows / layout_.rows);
    return p_.scales + line * p_.num_scales() + chunk * layout_.scales;
  }

  __device__ void store_row(int row, const float (&y)[kThreadColumns], float factor) const {
    store_codes(row, y, factor);
    if (p_.smoothed.data != nullptr) store_smoothed(row, y);
  }

  __device__ void store_codes(int row, const float (&y)[kThreadColumns], float factor) const {
    uint2 codes = codes_of(y, factor);
    char* const out =
        static_cast<char*>(p_.codes.data) + place_.batch * p_.codes.stride_batch +
        head_ * p_.codes.stride_head +
        (place_.sequence.begin + place_.chunk * kQuantizeRows + row) * p_.codes.stride_row;
    if (p_.bits == 8) {
      *reinterpret_cast<uint2*>(out + column_) = codes;
      return;
    }
    // Four threads hold 32 codes, the first two those for the upper halves of the bytes.
    codes.x &= 0x0f0f0f0fu;
    codes.y &= 0x0f0f0f0fu;
    const uint32_t low_x = __shfl_down_sync(mates_, codes.x, 2);
    const uint32_t low_y = __shfl_down_sync(mates_, codes.y, 2);
    if (column_ % 32 < 16) {
      *reinterpret_cast<uint2*>(out + column_ / 32 * 16 + column_ % 32) = {codes.x << 4 | low_x,
                                                                           codes.y << 4 | low_y};
    }
  }

  __device__ void store_smoothed(int row, const float (&y)[kThreadColumns]) const {
    alignas(16) Element elements[kThreadColumns];
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) elements[c] = from_float<Element>(y[c]);
    auto* const to = reinterpret_cast<uint4*>(
        static_cast<Element*>(p_.smoothed.data) + place_.batch * p_.smoothed.stride_batch +
        head_ * p_.smoothed.stride_head +
        (place_.sequence.begin + place_.chunk * kQuantizeRows + row) * p_.smoothed.stride_row +
        column_);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof elements / sizeof(uint4)); ++i)
      to[i] = reinterpret_cast<const uint4*>(elements)[i];
  }

  const QuantizeProblem& p_;
  SharedStorage& smem_;
  ScaleLayout layout_;
  int threads_of_row_;
  int first_row_;
  int column_;
  unsigned mates_ = 0;
  int64_t head_ = 0;
  ChunkPlace place_{};
  int count_ = 0;
  float mean_[kThreadColumns];
};

template <class Element>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_blocks_kernel(const __grid_constant__ QuantizeProblem problem) {
  __shared__ typename TileQuantizer<Element>::SharedStorage smem;
  TileQuantizer<Element>(problem, smem).run(blockIdx.x);
}

}  // namespace attnsieve::sm80
