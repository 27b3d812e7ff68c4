// NaN and Inf of V in steps that some rows see only in part.
#pragma once

#include "cuda/sm80/attend/step.cuh"

namespace attnsieve::sm80 {

using namespace cute;

// An accumulator ((2 columns, 2 rows), M, N) seen as (rows, columns).
template <class Layout_>
__device__ __forceinline__ auto as_rows_columns(Layout_ const& layout) {
  auto split = logical_divide(layout, Shape<_2>{});  // ((2, 2), M, N)
  return make_layout(make_layout(get<0, 1>(split), get<1>(split)),
                     make_layout(get<0, 0>(split), get<2>(split)));
}

// Row of the group, and column, of row `row` and column `column` of this thread's accumulator.
template <class Config>
__device__ __forceinline__ int accumulator_row(int row) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  return row / 2 * (16 * Config::kWarps) + warp * 16 + row % 2 * 8 + lane / 4;
}

__device__ __forceinline__ int accumulator_column(int column) {
  return column / 2 * 8 + threadIdx.x % 4 * 2 + column % 2;
}

// Adds the NaN and Inf of V's rows of one span to the rows of `out` (row, column) that see them.
template <class Config, class Steps, class Out>
__device__ void add_non_finite(const WorkTile& tile, typename Config::Element* span_rows, int key0,
                               Out& out) {
  constexpr int kRows = size<0>(Out{});
  using Element = typename Config::Element;
  const auto sV =
      make_tensor(make_smem_ptr(span_rows), typename Config::SmemLayoutUnit{});  // (N, D)
  RowBounds bounds[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    bounds[row] = row_bounds(tile, tile.row_begin + accumulator_row<Config>(row), key0);
  }
#pragma unroll 1
  for (int key = 0; key < Steps::kSpanKeys; ++key) {
#pragma unroll
    for (int column = 0; column < size<1>(out); ++column) {
      const Element value = sV(key, accumulator_column(column));
      if (!TileCopy<Config>::is_non_finite(reinterpret_cast<const uint16_t&>(value))) continue;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (bounds[row].contains(key)) out(row, column) += static_cast<float>(value);
      }
    }
  }
}

// In a step where some row does not see some key, 0 * NaN would carry a NaN or Inf of V into rows
// that must not see it. Such values are rare: add them to the rows that do see them, then replace
// them by zero for the MMA.
template <class Config, class Steps, class FragmentO>
__device__ void isolate_non_finite(const TileCopy<Config>& copy, const WorkTile& tile,
                                   const Steps& steps, const typename Steps::Keys& keys,
                                   typename Config::Element* smem_v, FragmentO& acc_o) {
  constexpr int kStepUnits = Config::kStepUnits;
  constexpr int kUnitSpans = Steps::kSpans / kStepUnits;
  constexpr int kUnitElements = kUnitKeys * Config::kHeadDim;
  bool found = false;
#pragma unroll 1
  for (int unit = 0; unit < kStepUnits; ++unit) {
    found |= copy.any_non_finite(smem_v + unit * kUnitElements);
  }
  if (!__syncthreads_or(found)) return;
  auto out = make_tensor(acc_o.data(), as_rows_columns(acc_o.layout()));
#pragma unroll 1
  for (int unit = 0; unit < kStepUnits; ++unit) {
    auto* const smem = smem_v + unit * kUnitElements;
#pragma unroll 1
    for (int span = 0; span < kUnitSpans; ++span) {
      add_non_finite<Config, Steps>(tile, copy.rows_from(smem, span * Steps::kSpanKeys),
                                    steps.first_key(keys, unit * kUnitSpans + span), out);
    }
    __syncthreads();
    copy.zero_non_finite(smem);
  }
  __syncthreads();
}

}  // namespace attnsieve::sm80
