// The accumulators of a warpgroup as rows: which query rows they are, which keys those see, maxima.
#pragma once

#include "cuda/common/softmax.cuh"
#include "cuda/sm90/attend/config.h"

namespace attnsieve::sm90 {

using namespace cute;

// kColumns registers of an accumulator ((2 columns, 2 rows, n8 tiles), 1, 1) as (rows, columns).
template <int kColumns>
using RowsColumns = Layout<Shape<_2, Shape<_2, Int<kColumns / 2>>>, Stride<_2, Stride<_1, _4>>>;

template <int kColumns, class Fragment>
__device__ __forceinline__ auto rows_columns(Fragment& fragment, int first_register) {
  return make_tensor(fragment.data() + first_register, RowsColumns<kColumns / 4>{});
}

// Query rows [begin, begin + 64) of `head`; those from `end` on do not exist.
struct Rows {
  int head;
  int begin;
  int end;
};

// Query row of accumulator row 0 or 1 of a thread, within the warpgroup's 64.
__device__ __forceinline__ int row_of(int thread, int row) {
  return thread % kWarpgroupThreads / 32 * 16 + thread % 32 / 4 + row * 8;
}

// Opaque, or what follows from it would be kept in registers through the main loop.
__device__ __forceinline__ int opaque_thread() {
  int thread = static_cast<int>(threadIdx.x);
  asm volatile("" : "+r"(thread));
  return thread;
}

// Of a row of accumulators over the keys of a step that this lane holds.
template <class Config, class Fragment>
__device__ __forceinline__ float lane_maximum(Fragment& acc_s, int step, int row) {
  const auto scores = rows_columns<Config::kStepKeys>(acc_s, step * Config::kStepKeys / 2);
  float even = scores(row, 0);
  float odd = scores(row, 1);
#pragma unroll
  for (int column = 2; column < size<1>(scores); column += 2) {
    even = max_nan(even, scores(row, column));
    odd = max_nan(odd, scores(row, column + 1));
  }
  return max_nan(even, odd);
}

// The same of numbers one of which is positive, as the maximum of three integers at a time costs
// what that of two floats does; if none is, a negative number. NaN counts as the greatest.
template <class Config, class Fragment>
__device__ __forceinline__ float positive_maximum(Fragment& acc_s, int step, int row) {
  const auto numbers = rows_columns<Config::kStepKeys>(acc_s, step * Config::kStepKeys / 2);
  int chains[2] = {__float_as_int(numbers(row, 0)), __float_as_int(numbers(row, 1))};
#pragma unroll
  for (int column = 2; column < size<1>(numbers); column += 2) {
    int& chain = chains[column / 2 % 2];
    chain = __vimax3_s32(chain, __float_as_int(numbers(row, column)),
                         __float_as_int(numbers(row, column + 1)));
  }
  return __int_as_float(max(chains[0], chains[1]));
}

// Keys that a row does not see become -inf. Returns whether the warpgroup's rows see any key.
template <class Config, class Fragment, class Record, class Work>
__device__ __forceinline__ bool mask_tile(Fragment& acc_s, const Record& record, const Work& work,
                                          const Rows& rows) {
  constexpr int kRegisters = Config::kGranuleKeys / 2;  // of a granule, for both rows
  const int thread = opaque_thread();
  const int first_row = max(rows.begin, 0);
  const int first_key = work.first_key(first_row);
  const int end_key = work.end_key(min(rows.begin + kWarpgroupRows, rows.end) - 1);
  bool seen = false;
#pragma unroll
  for (int granule = 0; granule < Config::kGranules; ++granule) {
    int key = record.key[granule];
    const int place = key < 0 ? ~key : key;
    seen |= first_row < rows.end && place < end_key && place + Config::kGranuleKeys > first_key;
    if (key < 0) key = Config::kNoKey;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query_row = rows.begin + row_of(thread, half);
      const int begin = work.first_key(query_row) - key - thread % 4 * 2;
      const int end = work.end_key(query_row) - key - thread % 4 * 2;
#pragma unroll
      for (int i = 0; i < kRegisters / 4; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int position = i * 8 + j;
          if (position < begin || position >= end) {
            acc_s(granule * kRegisters + i * 4 + half * 2 + j) = negative_infinity();
          }
        }
      }
    }
  }
  return seen;
}

}  // namespace attnsieve::sm90
