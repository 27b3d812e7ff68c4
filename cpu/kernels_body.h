// The kernels of one instruction set. Included by kernels_<isa>.cpp, which defines ATTNSIEVE_ISA
// (the namespace of the function table) and is compiled with that set's flags. See vec.h for what
// must not be used here.
#include "kernels.h"
#include "vec.h"

namespace attnsieve::cpu {
namespace {

inline int min_int(int a, int b) { return a < b ? a : b; }

template <class Convert>
inline void widen_row(const uint16_t* src, int64_t count, float* dst, Convert convert) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dst + i, convert(load_half(src + i)));
  if (i == count) return;
  uint16_t tail[kLanes] = {};
  float wide[kLanes];
  std::memcpy(tail, src + i, (count - i) * sizeof(uint16_t));
  store(wide, convert(load_half(tail)));
  std::memcpy(dst + i, wide, (count - i) * sizeof(float));
}

template <class Convert>
inline void narrow_row(const float* src, int64_t count, uint16_t* dst, Convert convert) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_half(dst + i, convert(load(src + i)));
  if (i == count) return;
  float tail[kLanes] = {};
  uint16_t half[kLanes];
  std::memcpy(tail, src + i, (count - i) * sizeof(float));
  store_half(half, convert(load(tail)));
  std::memcpy(dst + i, half, (count - i) * sizeof(uint16_t));
}

void widen(const void* src, DType dtype, int64_t stride, int64_t rows, int64_t cols, float* dst) {
  for (int64_t row = 0; row < rows; ++row, dst += cols) {
    if (dtype == DType::kFloat32) {
      std::memcpy(dst, static_cast<const float*>(src) + row * stride, cols * sizeof(float));
    } else if (dtype == DType::kBFloat16) {
      widen_row(static_cast<const uint16_t*>(src) + row * stride, cols, dst, widen_bfloat16);
    } else {
      widen_row(static_cast<const uint16_t*>(src) + row * stride, cols, dst, widen_float16);
    }
  }
}

void narrow(const float* src, DType dtype, int64_t count, void* dst) {
  if (dtype == DType::kFloat32) {
    std::memcpy(dst, src, count * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    narrow_row(src, count, static_cast<uint16_t*>(dst), narrow_bfloat16);
  } else {
    narrow_row(src, count, static_cast<uint16_t*>(dst), narrow_float16);
  }
}

constexpr int kMaxHeadDim = 256;
constexpr int kTransposeRows = 16;  // one cache line of the transposed side

typedef float Quad __attribute__((vector_size(16)));

// dst[j][i] = src[i][j] for i, j < 4; pitches count elements.
inline void transpose_4x4(const float* src, int src_pitch, float* dst, int dst_pitch) {
  Quad row[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&row[i], src + i * src_pitch, sizeof(Quad));
  const Quad low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Quad low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Quad high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Quad high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Quad column[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                          __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                          __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                          __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int j = 0; j < 4; ++j) std::memcpy(dst + j * dst_pitch, &column[j], sizeof(Quad));
}

void pack_query(const void* q, DType dtype, int64_t stride, int rows, int head_dim, int columns,
                float* query_t) {
  float block[kTransposeRows * kMaxHeadDim];
  const char* base = static_cast<const char*>(q);
  for (int row = 0; row < columns; row += kTransposeRows) {
    const int real = min_int(kTransposeRows, rows > row ? rows - row : 0);
    const int wanted = min_int(kTransposeRows, columns - row);
    widen(base + row * stride * element_size(dtype), dtype, stride, real, head_dim, block);
    std::memset(block + real * head_dim, 0, (wanted - real) * head_dim * sizeof(float));
    for (int d = 0; d < head_dim; d += 4) {
      for (int i = 0; i < wanted; i += 4) {
        transpose_4x4(block + i * head_dim + d, head_dim, query_t + d * kColumns + row + i,
                      kColumns);
      }
    }
  }
}

void store_out(const float* out_t, const float* row_scale, int rows, int head_dim, DType dtype,
               int64_t stride, void* out) {
  float block[kTransposeRows * kMaxHeadDim];
  char* base = static_cast<char*>(out);
  for (int row = 0; row < rows; row += kTransposeRows) {
    const int count = min_int(kTransposeRows, rows - row);
    for (int d = 0; d < head_dim; d += 4) {
      for (int i = 0; i < count; i += 4) {
        transpose_4x4(out_t + d * kColumns + row + i, kColumns, block + i * head_dim + d, head_dim);
      }
    }
    for (int i = 0; i < count; ++i) {
      const float scale = row_scale[row + i];
      float* line = block + i * head_dim;
      if (scale == 0.0f) {
        std::memset(line, 0, head_dim * sizeof(float));
      } else {
        for (int d = 0; d < head_dim; ++d) line[d] *= scale;
      }
      narrow(line, dtype, head_dim, base + (row + i) * stride * element_size(dtype));
    }
  }
}

// The product behind both scores() and accumulate(): sum[i] = sum over t < depth of a(i, t) * b[t]
// for kRows rows i and kVecs vectors of columns.
//   kScores:    a is K (i counts keys, t runs along head_dim);      c[i] = scale * sum[i]
//   kAddScores: the same over the next part of head_dim;            c[i] = scale * (c[i] + sum[i])
//   kOutput:    a is V read down its columns (i dims, t keys);      c[i] = rescale * c[i] + sum[i]
enum class Product { kScores, kAddScores, kOutput };

template <Product kProduct, int kRows, int kVecs>
inline void multiply_block(const float* a, int64_t stride, const float* b, int depth, float scale,
                           const float* rescale, float* c) {
  constexpr bool is_output = kProduct == Product::kOutput;
  // Unrolled by request: GCC 12 otherwise passes the accumulators through the stack around the
  // loop.
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec{};
  }
  const int64_t row_step = is_output ? 1 : stride;
  const int64_t depth_step = is_output ? stride : 1;
  for (int t = 0; t < depth; ++t, a += depth_step, b += kColumns) {
    Vec operand[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) operand[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float factor = a[i * row_step];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] += operand[v] * factor;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      float* target = c + i * kColumns + v * kLanes;
      Vec result = acc[i][v];
      if (kProduct == Product::kAddScores) result += load(target);
      // At the end: sums of sums err less than one long sum over all keys.
      if (is_output) result += load(target) * load(rescale + v * kLanes);
      store(target, is_output ? result : result * scale);
    }
  }
}

// The last rows of c, fewer than kBlockRows.
template <Product kProduct, int kRows, int kVecs>
inline void multiply_tail(int rows, const float* a, int64_t stride, const float* b, int depth,
                          float scale, const float* rescale, float* c) {
  if (rows == kRows) {
    multiply_block<kProduct, kRows, kVecs>(a, stride, b, depth, scale, rescale, c);
  } else if constexpr (kRows > 1) {
    multiply_tail<kProduct, kRows - 1, kVecs>(rows, a, stride, b, depth, scale, rescale, c);
  }
}

template <Product kProduct, int kVecs>
void multiply_panel(const float* a, int64_t stride, const float* b, int rows, int depth,
                    float scale, const float* rescale, float* c) {
  const int64_t row_step = kProduct == Product::kOutput ? 1 : stride;
  int i = 0;
  for (; i + kBlockRows <= rows; i += kBlockRows) {
    multiply_block<kProduct, kBlockRows, kVecs>(a + i * row_step, stride, b, depth, scale, rescale,
                                                c + i * kColumns);
  }
  multiply_tail<kProduct, kBlockRows - 1, kVecs>(rows - i, a + i * row_step, stride, b, depth,
                                                 scale, rescale, c + i * kColumns);
}

template <Product kProduct>
inline void multiply(const float* a, int64_t stride, const float* b, int rows, int depth,
                     float scale, const float* rescale, int columns, float* c) {
  constexpr int kPanel = kPanelVecs * kLanes;
  int column = 0;
  for (; column + kPanel <= columns; column += kPanel) {
    multiply_panel<kProduct, kPanelVecs>(a, stride, b + column, rows, depth, scale,
                                         rescale + column, c + column);
  }
  for (; column < columns; column += kLanes) {
    multiply_panel<kProduct, 1>(a, stride, b + column, rows, depth, scale, rescale + column,
                                c + column);
  }
}

// head_dim is summed in parts: one float accumulator over all of it would lose up to twice the
// precision of a blocked matrix product. The scale comes last, so that sums of exact products stay
// exact and equal ones stay equal.
void scores(const float* query_t, const float* k, int64_t stride, int keys, int head_dim,
            float scale, int columns, float* s) {
  constexpr int kPart = 16;
  // rescale is not read
  multiply<Product::kScores>(k, stride, query_t, keys, min_int(kPart, head_dim),
                             head_dim <= kPart ? scale : 1.0f, s, columns, s);
  for (int part = kPart; part < head_dim; part += kPart) {
    multiply<Product::kAddScores>(k + part, stride, query_t + part * kColumns, keys,
                                  min_int(kPart, head_dim - part),
                                  head_dim - part <= kPart ? scale : 1.0f, s, columns, s);
  }
}

void accumulate(const float* p, const float* v, int64_t stride, int keys, int head_dim,
                const float* rescale, int columns, float* out_t) {
  multiply<Product::kOutput>(v, stride, p, head_dim, keys, 1.0f, rescale, columns, out_t);
}

// Max over keys of one vector of columns, starting from `start`. A comparison drops NaN, so NaN is
// tracked on the side.
inline Vec column_max(const float* s, int keys, Vec start) {
  Vec max = start;
  IntVec is_nan = start != start;
  for (int key = 0; key < keys; ++key) {
    const Vec x = load(s + key * kColumns);
    max = x > max ? x : max;
    is_nan |= x != x;
  }
  return is_nan ? broadcast(__builtin_nanf("")) : max;
}

void max_over_keys(const float* s, int keys, int columns, float* tile_max) {
  for (int c = 0; c < columns; c += kLanes) {
    store(tile_max + c, column_max(s + c, keys, load(tile_max + c)));
  }
}

void softmax(float* s, int keys, int columns, float* row_max, float* row_sum, float* rescale) {
  for (int c = 0; c < columns; c += kLanes) {
    const Vec old_max = load(row_max + c);
    const Vec new_max = column_max(s + c, keys, old_max);
    // A row that has seen nothing keeps -inf as its maximum; 0 in its place gives exp(-inf) = 0
    // instead of NaN.
    const Vec shift = new_max == -kInfinity ? Vec{} : new_max;
    Vec sum = {};
    for (int key = 0; key < keys; ++key) {
      float* x = s + key * kColumns + c;
      const Vec p = exp_nonpositive(load(x) - shift);
      sum += p;
      store(x, p);
    }
    const Vec factor = exp_nonpositive(old_max - shift);
    store(rescale + c, factor);
    store(row_sum + c, load(row_sum + c) * factor + sum);
    store(row_max + c, new_max);
  }
}

}  // namespace

namespace ATTNSIEVE_ISA {

#define ATTNSIEVE_STRING_OF(x) #x
#define ATTNSIEVE_STRING(x) ATTNSIEVE_STRING_OF(x)

constexpr Kernels kKernels = {ATTNSIEVE_STRING(ATTNSIEVE_ISA),
                              kLanes,
                              widen,
                              narrow,
                              pack_query,
                              scores,
                              max_over_keys,
                              softmax,
                              accumulate,
                              store_out};

extern const Kernels* const kTable;
const Kernels* const kTable = &kKernels;

}  // namespace ATTNSIEVE_ISA
}  // namespace attnsieve::cpu
