// Computes        k_cache[j], v_cache[j] = new rows, as they are or as float8_e4m3 codes of x / scale;
//                 bounds[p] = minimum and maximum of the stored keys of every page that received a
//                 row; proxy[j] = k[j] . projection.
// Roles           A CTA owns a segment: whole pages of the bounds, at least 16 positions, of one
//                 sequence and KV head. Threads own pieces of 8 elements of a row; for the
//                 projection a column of it and a slice of head_dim.
// Shared memory   Bounds of the threads' pieces, or new rows and the slices' sums (12 KB).
// Invariants      Bounds come from the values as stored: of new rows before they are written, of
//                 older ones from the cache. Sums are added in one order, whatever the rows beside
//                 them. One launch; nothing of it depends on lengths or tables.
// Not handled     Pages that two sequences write: no order is promised.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "cuda/sm80/append_kv/segment.cuh"

namespace attnsieve::sm80 {

inline constexpr int kAppendThreads = 128;
inline constexpr int kAppendCtasPerSm = 4;
inline constexpr int kPieceElements = 8;
inline constexpr int kMaxPieces = 256 / kPieceElements;  // of a row
inline constexpr int kProjectedRows = 8;  // at a time
inline constexpr int kRowsAtOnce = 2;  // of keys, so that their reads overlap

// 8 elements that lie side by side, 16-byte aligned.
template <class Element>
struct alignas(16) Piece {
  Element x[kPieceElements];
};

struct alignas(8) Codes {
  __nv_fp8_storage_t x[kPieceElements];
};

struct BoundPiece {
  float min[kPieceElements];
  float max[kPieceElements];
};

union AppendStorage {
  BoundPiece bounds[kAppendThreads];
  struct {
    float rows[kProjectedRows][256];
    float sums[kProjectedRows][kAppendThreads];
  } projection;
};

// Element i of a float tensor of any type.
__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kFloat16: return to_float(static_cast<const __half*>(data)[i]);
    default: return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
}

__device__ __forceinline__ void store_float(void* data, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[i] = x; return;
    case DType::kFloat16: static_cast<__half*>(data)[i] = from_float<__half>(x); return;
    default: static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(x);
  }
}

template <class Element, bool kFloat8>
class SegmentAppend {
 public:
  __device__ SegmentAppend(const AppendKvArguments& a, const Segment& segment, int64_t head,
                           AppendStorage& smem)
      : a_(a), p_(a.problem), segment_(segment), head_(head), smem_(smem) {}

  __device__ void run() {
    // The first row of v is under way while the keys are written.
    const int64_t first_value = segment_.begin() + own_row();
    Piece<Element> value;
    if (owns(first_value)) value = load_new(p_.v, first_value);
    if (p_.bounds.data == nullptr) {
      append_keys(segment_.begin(), segment_.end(), false);
    } else {
      const int64_t page = p_.bounds_page_size;
      for (int64_t first = segment_.page_begin(); first < segment_.end(); first += page) {
        if (first + page > segment_.begin()) append_keys(first, first + page, true);
      }
    }
    for (int64_t j = first_value; owns(j); j += row_stride()) {
      if (j > first_value) value = load_new(p_.v, j);
      const int64_t at = place_in(p_.v_cache, j);
      if (at >= 0) write(p_.v_cache, at, stored_of(value, p_.v_scale));
    }
    if (p_.proxy.data == nullptr) return;
    const int group = static_cast<int>(p_.num_proxy_heads) / static_cast<int>(p_.num_kv_heads);
    for (int i = 0; i < group; ++i) project(head_ * group + i);
  }

 private:
  __device__ int pieces() const { return static_cast<int>(p_.head_dim) / kPieceElements; }
  // Threads that take the same piece of different rows.
  __device__ int row_stride() const { return kAppendThreads / pieces(); }
  __device__ int own_piece() const { return static_cast<int>(threadIdx.x) % pieces(); }
  __device__ int own_row() const { return static_cast<int>(threadIdx.x) / pieces(); }

  __device__ Piece<Element> load_new(const HeadTensor& rows, int64_t j) const {
    const auto* row = static_cast<const Element*>(rows.data) +
                      segment_.batch() * rows.stride_batch + head_ * rows.stride_head +
                      segment_.source_row(j) * rows.stride_row;
    return *reinterpret_cast<const Piece<Element>*>(row + own_piece() * kPieceElements);
  }

  // Whether position j is a new row whose piece the thread takes.
  __device__ bool owns(int64_t j) const { return own_row() < row_stride() && j < segment_.end(); }

  // Offset of row j of a head in a cache; negative where there is no place for it.
  __device__ int64_t row_in(const HeadTensor& cache, int64_t head, int64_t j) const {
    const int64_t place = segment_.place_of(j);
    if (place < 0) return -1;
    return place * cache.stride_batch + head * cache.stride_head +
           segment_.row_of(j) * cache.stride_row;
  }

  // The same of the thread's piece of it.
  __device__ int64_t place_in(const HeadTensor& cache, int64_t j) const {
    const int64_t row = row_in(cache, head_, j);
    return row < 0 ? row : row + own_piece() * kPieceElements;
  }

  // What a cache holds of a piece.
  using Stored = std::conditional_t<kFloat8, Codes, Piece<Element>>;

  __device__ Stored stored_of(const Piece<Element>& piece, const float* scale) const {
    if constexpr (kFloat8) {
      Codes codes;
#pragma unroll
      for (int i = 0; i < kPieceElements; ++i) {
        const float x = __fdiv_rn(to_float(piece.x[i]), scale[head_]);
        codes.x[i] = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
      }
      return codes;
    } else {
      return piece;
    }
  }

  __device__ void write(const HeadTensor& cache, int64_t at, const Stored& stored) const {
    if constexpr (kFloat8) {
      auto* to = static_cast<__nv_fp8_storage_t*>(cache.data) + at;
      if (a_.aligned_codes) {
        *reinterpret_cast<Codes*>(to) = stored;
        return;
      }
#pragma unroll
      for (int i = 0; i < kPieceElements; ++i) to[i] = stored.x[i];
    } else {
      *reinterpret_cast<Stored*>(static_cast<Element*>(cache.data) + at) = stored;
    }
  }

  __device__ Stored read(const HeadTensor& cache, int64_t at) const {
    if constexpr (kFloat8) {
      const auto* from = static_cast<const __nv_fp8_storage_t*>(cache.data) + at;
      if (a_.aligned_codes) return *reinterpret_cast<const Codes*>(from);
      Codes codes;
#pragma unroll
      for (int i = 0; i < kPieceElements; ++i) codes.x[i] = from[i];
      return codes;
    } else {
      return *reinterpret_cast<const Stored*>(static_cast<const Element*>(cache.data) + at);
    }
  }

  static __device__ float number_of(const Stored& stored, int i) {
    if constexpr (kFloat8) {
      return __half2float(__half(__nv_cvt_fp8_to_halfraw(stored.x[i], __NV_E4M3)));
    } else {
      return to_float(stored.x[i]);
    }
  }

  // The new keys among [first, last); with `bounded` that is a page, and its older keys count too.
  __device__ void append_keys(int64_t first, int64_t last, bool bounded) {
    BoundPiece bound;
#pragma unroll
    for (int i = 0; i < kPieceElements; ++i) {
      bound.min[i] = -negative_infinity();
      bound.max[i] = negative_infinity();
    }
    last = min64(last, segment_.end());
    for (int64_t j = first + own_row(); owns(j) && j < last; j += kRowsAtOnce * row_stride()) {
      int64_t at[kRowsAtOnce];
      Stored rows[kRowsAtOnce];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const int64_t own = j + i * row_stride();
        at[i] = own < last ? place_in(p_.k_cache, own) : -1;
        if (at[i] < 0) continue;
        if (own < segment_.begin()) {
          rows[i] = read(p_.k_cache, at[i]);
        } else {
          rows[i] = stored_of(load_new(p_.k, own), p_.k_scale);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (at[i] < 0) continue;
        if (j + i * row_stride() >= segment_.begin()) write(p_.k_cache, at[i], rows[i]);
#pragma unroll
        for (int e = 0; e < kPieceElements; ++e) {
          bound.min[e] = min_nan(bound.min[e], number_of(rows[i], e));
          bound.max[e] = max_nan(bound.max[e], number_of(rows[i], e));
        }
      }
    }
    if (!bounded) return;
    smem_.bounds[threadIdx.x] = bound;
    __syncthreads();
    store_bounds(first);
    __syncthreads();
  }

  // Element d of both bounds is a thread's, over the rows that others have seen.
  __device__ void store_bounds(int64_t first) const {
    const int64_t place = segment_.place_of(first);
    if (place < 0) return;
    const HeadTensor& bounds = p_.bounds;
    const bool paged = p_.pages.block_table != nullptr;
    const int page = static_cast<int>(first) / static_cast<int>(p_.bounds_page_size);
    const int64_t to = place * bounds.stride_batch + head_ * bounds.stride_head +
                       (paged ? 0 : page * bounds.stride_row);
    for (int d = threadIdx.x; d < p_.head_dim; d += kAppendThreads) {
      float min = -negative_infinity();
      float max = negative_infinity();
      for (int row = 0; row < row_stride(); ++row) {
        const BoundPiece& bound = smem_.bounds[row * pieces() + d / kPieceElements];
        min = min_nan(min, bound.min[d % kPieceElements]);
        max = max_nan(max, bound.max[d % kPieceElements]);
      }
      store_float(bounds.data, p_.bounds_dtype, to + d, min);
      store_float(bounds.data, p_.bounds_dtype, to + p_.bounds_stride_bound + d, max);
    }
  }

  // Rows of one proxy head, kProjectedRows at a time.
  __device__ void project(int64_t proxy_head) {
    for (int64_t first = segment_.begin(); first < segment_.end(); first += kProjectedRows) {
      const int rows = static_cast<int>(min64(kProjectedRows, segment_.end() - first));
      if (own_row() < row_stride()) {
        for (int row = own_row(); row < rows; row += row_stride()) {
          const Piece<Element> piece = load_new(p_.k, first + row);
#pragma unroll
          for (int i = 0; i < kPieceElements; ++i) {
            smem_.projection.rows[row][own_piece() * kPieceElements + i] = to_float(piece.x[i]);
          }
        }
      }
      __syncthreads();
      for (int64_t column = 0; column < p_.proxy_dim; column += kAppendThreads) {
        project_columns(proxy_head, first, rows, static_cast<int>(column));
      }
    }
  }

  // Columns [first_column, + kAppendThreads): threads share head_dim where the columns are few.
  __device__ void project_columns(int64_t proxy_head, int64_t first, int rows, int first_column) {
    const int columns = min(kAppendThreads, static_cast<int>(p_.proxy_dim) - first_column);
    const int slices = kAppendThreads / columns;
    const int slice = static_cast<int>(threadIdx.x) / columns;
    const int column = static_cast<int>(threadIdx.x) % columns;
    const int dim = static_cast<int>(p_.head_dim);
    const int slice_dim = (dim + slices - 1) / slices;
    float sums[kProjectedRows] = {};
    if (slice < slices) {
      const int64_t matrix = proxy_head * p_.projection.stride_head + first_column + column;
      const int end = min(dim, (slice + 1) * slice_dim);
#pragma unroll 16
      for (int d = slice * slice_dim; d < end; ++d) {
        const float x = load_float(p_.projection.data, p_.projection_dtype,
                                   matrix + d * p_.projection.stride_row);
#pragma unroll
        for (int row = 0; row < kProjectedRows; ++row) {
          sums[row] = fmaf(smem_.projection.rows[row][d], x, sums[row]);
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kProjectedRows; ++row) {
      smem_.projection.sums[row][threadIdx.x] = sums[row];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * columns; i += kAppendThreads) {
      const int row = i / columns;
      const int64_t to = row_in(p_.proxy, proxy_head, first + row);
      if (to < 0) continue;
      float sum = 0.0f;
      for (int s = 0; s < slices; ++s) {
        sum += smem_.projection.sums[row][s * columns + i % columns];
      }
      store_float(p_.proxy.data, p_.proxy_dtype, to + first_column + i % columns, sum);
    }
    __syncthreads();
  }

  const AppendKvArguments& a_;
  const AppendKvProblem& p_;
  const Segment& segment_;
  int64_t head_;
  AppendStorage& smem_;
};

template <class Element, bool kFloat8>
__global__ void __launch_bounds__(kAppendThreads, kAppendCtasPerSm)
    append_kv_kernel(const __grid_constant__ AppendKvArguments a) {
  __shared__ AppendStorage smem;
  const auto heads = static_cast<unsigned>(a.problem.num_kv_heads);
  const Segment segment(a, static_cast<int>(blockIdx.x / heads));
  if (segment.empty()) return;
  SegmentAppend<Element, kFloat8>(a, segment, blockIdx.x % heads, smem).run();
}

}  // namespace attnsieve::sm80
