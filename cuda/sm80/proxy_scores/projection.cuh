// Computes        projected[v] = vector v . matrix, rounded to Element: queries narrowed to proxies.
// Roles           A thread owns two columns and a slice of the vectors' elements, 8 at a time.
// Shared memory   The slices' sums (16 KB) and the results.
// Invariants      A result is summed in one order, whatever the vectors beside it.
#pragma once

#include "cuda/sm80/proxy_scores/units.cuh"

namespace attnsieve::sm80 {

inline constexpr int kProjectedVectors = 8;

template <class Element, int kThreads, int kColumns>
class QueryProjection {
  static constexpr int kPairs = kColumns / 2;
  static constexpr int kSlices = kThreads / kPairs;
  static constexpr int kAtOnce = 2;  // vectors in a thread's registers
  static constexpr int kPiece = 8;

  struct alignas(2 * sizeof(Element)) Pair {
    Element x[2];
  };
  struct alignas(16) Piece {
    Element x[kPiece];
  };

 public:
  struct SharedStorage {
    alignas(16) Element rows[kProjectedVectors][kColumns];
    alignas(8) float sums[kProjectedVectors][kSlices][kColumns];
  };

  // row_of(v): vector v of `count`. Rows from `count` and columns from head_dim on become 0. By all
  // threads of a CTA, which meet behind it.
  template <class RowOf>
  static __device__ void run(const ProxyScoresProblem& p, const Element* matrix, int count,
                             RowOf&& row_of, SharedStorage& smem) {
    const int column = static_cast<int>(threadIdx.x) % kPairs * 2;
    const int slice = static_cast<int>(threadIdx.x) / kPairs;
    const bool exists = column < static_cast<int>(p.head_dim);
#pragma unroll 1
    for (int first = 0; first < count; first += kAtOnce) {
      float sums[kAtOnce][2] = {};
#pragma unroll 1
      for (int d = slice * kPiece; exists && d < static_cast<int>(p.query_dim);
           d += kSlices * kPiece) {
        Piece pieces[kAtOnce];
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
          const int own = min(first + v, count - 1);
          pieces[v] = *reinterpret_cast<const Piece*>(row_of(own) + d);
        }
        const Element* from = matrix + d * p.projection.stride_row + column;
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          const Pair pair = *reinterpret_cast<const Pair*>(from);
          from += p.projection.stride_row;
#pragma unroll
          for (int v = 0; v < kAtOnce; ++v) {
            const float x = to_float(pieces[v].x[i]);
            sums[v][0] = fmaf(x, to_float(pair.x[0]), sums[v][0]);
            sums[v][1] = fmaf(x, to_float(pair.x[1]), sums[v][1]);
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        auto* const to = reinterpret_cast<float2*>(&smem.sums[first + v][slice][column]);
        *to = make_float2(sums[v][0], sums[v][1]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kProjectedVectors * kColumns; i += kThreads) {
      const int v = i / kColumns;
      float sum = 0.0f;
      if (v < count) {
#pragma unroll
        for (int s = 0; s < kSlices; ++s) sum += smem.sums[v][s][i % kColumns];
      }
      smem.rows[v][i % kColumns] = from_float<Element>(sum);
    }
    __syncthreads();
  }
};

// Where the kernels below do not project themselves: all vectors, into [B, Hq, R, dp]. A CTA takes
// up to 8 vectors of one matrix.
template <class Element, int kThreads>
__global__ void __launch_bounds__(kThreads)
    project_queries_kernel(const __grid_constant__ ProxyScoresArguments a) {
  constexpr int kMaxDim = 256;
  using Projection = QueryProjection<Element, kThreads, kMaxDim>;
  __shared__ typename Projection::SharedStorage smem;
  const ProxyScoresProblem& p = a.problem;
  const int rows = static_cast<int>(p.num_rows);
  const int matrices = static_cast<int>(p.num_projections);
  const int heads = static_cast<int>(p.num_heads) / matrices;
  const int chunks = (heads * rows + kProjectedVectors - 1) / kProjectedVectors;
  const int first = static_cast<int>(blockIdx.x) % chunks * kProjectedVectors;
  const int matrix = static_cast<int>(blockIdx.x) / chunks % matrices;
  const int batch = static_cast<int>(blockIdx.x) / chunks / matrices;
  const int count = min(kProjectedVectors, heads * rows - first);
  const auto head_of = [&](int v) { return matrix * heads + (first + v) / rows; };
  const auto row_in = [&](int v) { return (first + v) % rows; };
  Projection::run(
      p,
      static_cast<const Element*>(p.projection.data) + batch * p.projection.stride_batch +
          matrix * p.projection.stride_head,
      count,
      [&](int v) {
        return static_cast<const Element*>(p.q.data) + batch * p.q.stride_batch +
               head_of(v) * p.q.stride_head + row_in(v) * p.q.stride_row;
      },
      smem);
  const int columns = static_cast<int>(p.head_dim);
  for (int i = threadIdx.x; i < count * columns; i += kThreads) {
    const int v = i / columns;
    const int64_t line =
        (static_cast<int64_t>(batch) * p.num_heads + head_of(v)) * p.num_rows + row_in(v);
    static_cast<Element*>(a.projected)[line * columns + i % columns] = smem.rows[v][i % columns];
  }
}

}  // namespace attnsieve::sm80
