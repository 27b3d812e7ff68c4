// The numeric inner loops of the CPU backend, compiled once per instruction set from kernels_body.h
// and chosen at load time. Everything that is not a hot loop (masks, lists, votes) lives outside,
// in attend_group.cpp.
//
// All tiles are transposed: query rows run across vector lanes. A tile is float32 [keys][kColumns]
// or [head_dim][kColumns], of which the first `columns` (a multiple of `lanes`) are computed. That
// way K and V are only ever read as scalars and need no packing, softmax needs no reduction across
// lanes, and a NaN in one query row cannot reach another.
#pragma once

#include <cstdint>

#include "attnsieve/block_index.h"
#include "attnsieve/tensor_view.h"

namespace attnsieve::cpu {

inline constexpr int kColumns = kGroupRows;  // row pitch of every transposed tile

struct Kernels {
  const char* name;
  int lanes;

  // rows x cols elements of `dtype`, `stride` elements apart -> dense float32 [rows, cols].
  void (*widen)(const void* src, DType dtype, int64_t stride, int64_t rows, int64_t cols,
                float* dst);
  // count float32 -> `dtype`, rounded to nearest even.
  void (*narrow)(const float* src, DType dtype, int64_t count, void* dst);
  // query_t[d][row] = q[row][d]; columns past `rows` become 0.
  void (*pack_query)(const void* q, DType dtype, int64_t stride, int rows, int head_dim,
                     int columns, float* query_t);
  // s[key][row] = scale * (k[key] . q[row]). k is float32, rows `stride` elements apart.
  void (*scores)(const float* query_t, const float* k, int64_t stride, int keys, int head_dim,
                 float scale, int columns, float* s);
  // tile_max[row] = max(tile_max[row], max over keys of s[key][row]); NaN wins over everything.
  void (*max_over_keys)(const float* s, int keys, int columns, float* tile_max);
  // One step of the online softmax: raises row_max, turns s into p = exp(s - row_max), updates
  // row_sum and returns the factor exp(old row_max - new row_max) that the output accumulated so
  // far has to be multiplied with.
  void (*softmax)(float* s, int keys, int columns, float* row_max, float* row_sum, float* rescale);
  // out_t[d][row] = out_t[d][row] * rescale[row] + sum over keys of v[key][d] * p[key][row].
  void (*accumulate)(const float* p, const float* v, int64_t stride, int keys, int head_dim,
                     const float* rescale, int columns, float* out_t);
  // out[row][d] = out_t[d][row] * row_scale[row], rounded to `dtype`. row_scale 0 stores 0 whatever
  // out_t holds.
  void (*store_out)(const float* out_t, const float* row_scale, int rows, int head_dim, DType dtype,
                    int64_t stride, void* out);
};

// The widest set that this build holds and this machine runs.
const Kernels& kernels();

// nullptr where the set was not compiled in or the machine lacks it. Tests walk all of them.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// static: an inline function shared by files with different instruction sets could end up as the
// copy of the widest one.
static inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace attnsieve::cpu
