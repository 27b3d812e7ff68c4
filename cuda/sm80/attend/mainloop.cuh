// The loop over units: S = Q K^T -> mask -> online softmax -> O += P V. Reads global memory only
// through the iterator and TileCopy.
#pragma once

#include "cuda/common/skip_policy.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/sm80/attend/non_finite.cuh"

namespace attnsieve::sm80 {

using namespace cute;

// An accumulator seen as the A operand of the next m16n8k16 MMA: two neighbouring n8 tiles
// make one k16.
template <class Layout_>
__device__ __forceinline__ auto as_operand_a(Layout_ const& layout) {
  auto split = logical_divide(layout, Shape<Underscore, Underscore, _2>{});  // (4, M, (2, N / 2))
  return make_layout(make_layout(get<0>(split), get<2, 0>(split)), get<1>(split), get<2, 1>(split));
}

template <class Config, class BlockIterator, class SkipPolicy>
class AttendMainloop {
 public:
  using Element = typename Config::Element;
  using TiledMma = typename Config::TiledMma;
  using SharedStorage = typename Config::SharedStorage;
  using Steps = std::conditional_t<Config::kInPieces, PieceSteps<Config>, UnitSteps<Config>>;
  using StepKeys = typename Steps::Keys;
  static_assert(Config::kInPieces == BlockIterator::kInPieces);
  static constexpr int kRows =
      2 * Config::kTileM / (16 * Config::kWarps);  // rows held by one thread
  static constexpr int kStepUnits = Config::kStepUnits;
  static constexpr int kTileSteps = SkipPolicy::kVotes ? 2 / kStepUnits : 1;
  static constexpr int kQueryChunks = Config::kHeadDim / 16;  // k16 chunks of Q K^T
  static_assert(kTileSteps <= Config::kStages, "a voted tile stays resident until its vote");

  using FragmentO = decltype(partition_fragment_C(
      TiledMma{}, Shape<Int<Config::kTileM>, Int<Config::kHeadDim>>{}));
  using FragmentS =
      decltype(partition_fragment_C(TiledMma{}, Shape<Int<Config::kTileM>, Int<Config::kTileN>>{}));
  using FragmentQ = decltype(TiledMma{}.get_thread_slice(0).partition_fragment_A(make_tensor(
      make_smem_ptr(static_cast<Element*>(nullptr)), typename Config::SmemLayoutUnit{})));
  using FragmentP = decltype(make_tensor<Element>(FragmentS{}.layout()));

  __device__ AttendMainloop(const AttendProblem& problem, const WorkTile& tile, SharedStorage& smem)
      : problem_(problem), tile_(tile), smem_(smem), steps_(problem, tile, smem) {
    if (threadIdx.x == 0) {
      smem.k_base = sequence_base(problem.k);
      smem.v_base = sequence_base(problem.v);
    }
    __syncthreads();
  }

  // Query row of accumulator row `row` of this thread, within the sequence.
  __device__ int query_row(int row) const { return tile_.row_begin + accumulator_row<Config>(row); }

  __device__ void run(BlockIterator& iterator, SkipPolicy& policy, FragmentO& acc_o,
                      OnlineSoftmax<kRows>& softmax) {
    load_q();
    clear(acc_o);
    FragmentQ query;
    FragmentS acc_s[kTileSteps];
    float step_max[kTileSteps][kRows];
    StepKeys keys[kTileSteps];
    bool first_tile = true;
    int steps = start_k(iterator, keys);

    while (steps > 0) {
      cp_async_wait<0>();
      __syncthreads();  // Q and this tile's K have arrived; nobody reads the old V any more
      if constexpr (Config::kQueryInRegisters) {
        if (first_tile) {
#pragma unroll
          for (int chunk = 0; chunk < kQueryChunks; ++chunk) load_query_chunk(query, chunk);
        }
      }
      if constexpr (!SkipPolicy::kVotes) load_v(1, keys);
#pragma unroll
      for (int step = 0; step < kTileSteps; ++step) {
        if (step < steps) {
          scores(acc_s[step], query, step);
          if (steps_.needs_step_mask(keys[step])) apply_mask(acc_s[step], keys[step]);
          maxima(acc_s[step], step_max[step]);
        }
      }
      StepKeys next_keys[kTileSteps];
      int next_steps;
      bool kept = true;
      if constexpr (SkipPolicy::kVotes) {
        const bool veto = first_tile || vote(policy, step_max, steps, softmax);
        kept = __syncthreads_or(veto);  // also: every warp is done with this tile's K
        policy.count(kept ? 0 : 1, 1);
        if (kept) load_v(steps, keys);
        next_steps = start_k(iterator, next_keys);
        if (kept) {
          cp_async_wait<1>();  // V of this tile; the next K stays in flight
          __syncthreads();
        }
      } else {
        cp_async_wait<0>();
        __syncthreads();  // V has arrived and every warp is done with K
        next_steps = start_k(iterator, next_keys);
      }
      if (kept) {
#pragma unroll
        for (int step = 0; step < kTileSteps; ++step) {
          if (step < steps) {
            attend_step(acc_s[step], acc_o, step_max[step], softmax, step, keys[step]);
          }
        }
      }
      first_tile = false;
      steps = next_steps;
#pragma unroll
      for (int step = 0; step < kTileSteps; ++step) keys[step] = next_keys[step];
    }
    cp_async_wait<0>();
    __syncthreads();  // shared memory is free for the epilogue
  }

 private:
  __device__ void load_q() {
    const int64_t offset =
        tile_.batch * problem_.q.stride_batch + tile_.head * problem_.q.stride_head +
        static_cast<int64_t>(tile_.token_q + tile_.row_begin) * problem_.q.stride_row;
    copy_.load(smem_.q, static_cast<const Element*>(problem_.q.data) + offset,
               problem_.q.stride_row, tile_.row_end - tile_.row_begin);
  }

  // Starts the K loads of the iterator's next tile (one group of cp.async); returns its steps.
  __device__ int start_k(BlockIterator& iterator, StepKeys (&keys)[kTileSteps]) {
    const int units = min(iterator.tile_units(), kTileSteps * kStepUnits);
    const int steps = (units + kStepUnits - 1) / kStepUnits;
    steps_.begin_tile();
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) {
      keys[step] = steps_.next(iterator, step, units - step * kStepUnits);
      if (step < steps) {
        steps_.load(copy_, smem_.k[step], smem_.k_base, problem_.k, step, keys[step]);
      }
    }
    cp_async_commit();
    return steps;
  }

  // Starts the V loads of a tile, one group of cp.async.
  __device__ void load_v(int steps, const StepKeys (&keys)[kTileSteps]) {
#pragma unroll
    for (int step = 0; step < kTileSteps; ++step) {
      if (step < steps) {
        steps_.load(copy_, smem_.v[step], smem_.v_base, problem_.v, step, keys[step]);
      }
    }
    cp_async_commit();
  }

  __device__ const Element* sequence_base(const HeadTensor& tensor) const {
    const int batch = Config::kInPieces && problem_.paged.block_table != nullptr ? 0 : tile_.batch;
    return static_cast<const Element*>(tensor.data) + batch * tensor.stride_batch +
           tile_.kv_head * tensor.stride_head + tile_.token_k * tensor.stride_row;
  }

  // One k16 chunk of Q fragments from shared memory.
  __device__ void load_query_chunk(FragmentQ& query, int chunk) const {
    TiledMma mma;
    const auto sQ =
        make_tensor(make_smem_ptr(smem_.q), typename Config::SmemLayoutUnit{});  // (M, D)
    const auto copy_q = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
    const auto thread_q = copy_q.get_thread_slice(threadIdx.x);
    const auto tSsQ = thread_q.partition_S(sQ);  // (CPY, M, K)
    auto tSrQ_copy = thread_q.retile_D(query);  // (CPY, M, K)
    copy(copy_q, tSsQ(_, _, chunk), tSrQ_copy(_, _, chunk));
  }

  // acc_s = Q K^T. ptxas hoists the next fragments' loads as far as registers allow; doing it by
  // hand made it spill.
  __device__ void scores(FragmentS& acc_s, FragmentQ& query, int stage) const {
    TiledMma mma;
    const auto thread_mma = mma.get_thread_slice(threadIdx.x);
    const auto sK =
        make_tensor(make_smem_ptr(smem_.k[stage]), typename Config::SmemLayoutKV{});  // (N, D)
    auto tSrK = thread_mma.partition_fragment_B(sK);  // (MMA, N, K)
    const auto copy_k = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
    const auto thread_k = copy_k.get_thread_slice(threadIdx.x);
    const auto tSsK = thread_k.partition_S(sK);
    auto tSrK_copy = thread_k.retile_D(tSrK);
    clear(acc_s);
#pragma unroll
    for (int chunk = 0; chunk < kQueryChunks; ++chunk) {
      if constexpr (!Config::kQueryInRegisters) load_query_chunk(query, chunk);
      copy(copy_k, tSsK(_, _, chunk), tSrK_copy(_, _, chunk));
      cute::gemm(mma, query(_, _, chunk), tSrK(_, _, chunk), acc_s);
    }
  }

  // Online softmax of one step and its P V.
  __device__ void attend_step(FragmentS& acc_s, FragmentO& acc_o, const float (&step_max)[kRows],
                              OnlineSoftmax<kRows>& softmax, int stage, const StepKeys& keys) {
    softmax.update(make_tensor(acc_s.data(), as_rows_columns(acc_s.layout())),
                   make_tensor(acc_o.data(), as_rows_columns(acc_o.layout())), step_max,
                   problem_.softmax_scale * kLog2e);
    const FragmentP weights = round_weights(acc_s);
    if (steps_.needs_step_mask(keys)) {
      isolate_non_finite<Config>(copy_, tile_, steps_, keys, smem_.v[stage], acc_o);
    }
    accumulate(weights, acc_o, stage);
  }

  static __device__ FragmentP round_weights(const FragmentS& acc_s) {
    FragmentP weights;
#pragma unroll
    for (int i = 0; i < size(weights); ++i) weights(i) = static_cast<Element>(acc_s(i));
    return weights;
  }

  // acc_o += P V.
  __device__ void accumulate(const FragmentP& rP, FragmentO& acc_o, int stage) {
    TiledMma mma;
    const auto thread_mma = mma.get_thread_slice(threadIdx.x);
    const auto tOrP = make_tensor(rP.data(), as_operand_a(rP.layout()));  // (MMA, M, K)
    const auto sVt =
        make_tensor(make_smem_ptr(smem_.v[stage]), typename Config::SmemLayoutVt{});  // (D, N)
    const auto sVt_plain =
        make_tensor(sVt.data(), get_nonswizzle_portion(typename Config::SmemLayoutVt{}));
    auto tOrVt = thread_mma.partition_fragment_B(sVt_plain);  // (MMA, D, K)
    const auto copy_v = make_tiled_copy_B(Copy_Atom<SM75_U16x8_LDSM_T, Element>{}, mma);
    const auto thread_v = copy_v.get_thread_slice(threadIdx.x);
    const auto tOsVt = thread_v.partition_S(sVt);
    auto tOrVt_copy = thread_v.retile_D(tOrVt);
    copy(copy_v, tOsVt(_, _, _0{}), tOrVt_copy(_, _, _0{}));
#pragma unroll
    for (int step = 0; step < size<2>(tOrP); ++step) {
      if (step + 1 < size<2>(tOrP)) copy(copy_v, tOsVt(_, _, step + 1), tOrVt_copy(_, _, step + 1));
      cute::gemm(mma, tOrP(_, _, step), tOrVt(_, _, step), acc_o);
    }
  }

  __device__ void apply_mask(FragmentS& acc_s, const StepKeys& keys) const {
    auto scores = make_tensor(acc_s.data(), as_rows_columns(acc_s.layout()));
    constexpr int kSpanColumns = size<1>(decltype(scores){}) / Steps::kSpans;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int span = 0; span < Steps::kSpans; ++span) {
        const RowBounds bounds = row_bounds(tile_, query_row(row), steps_.first_key(keys, span));
#pragma unroll
        for (int column = 0; column < kSpanColumns; ++column) {
          const int key = accumulator_column(column);
          if (!bounds.contains(key)) {
            scores(row, span * kSpanColumns + column) = negative_infinity();
          }
        }
      }
    }
  }

  static __device__ void maxima(const FragmentS& acc_s, float (&step_max)[kRows]) {
    const auto scores = make_tensor(acc_s.data(), as_rows_columns(acc_s.layout()));
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float row_max = scores(row, 0);
#pragma unroll
      for (int column = 1; column < size<1>(scores); ++column)
        row_max = max_nan(row_max, scores(row, column));
      step_max[row] = quad_max(row_max);
    }
  }

  __device__ bool vote(const SkipPolicy& policy, const float (&step_max)[kTileSteps][kRows],
                       int steps, const OnlineSoftmax<kRows>& softmax) const {
    bool veto = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float tile_max = step_max[0][row];
#pragma unroll
      for (int step = 1; step < kTileSteps; ++step) {
        if (step < steps) tile_max = max_nan(tile_max, step_max[step][row]);
      }
      if (query_row(row) < tile_.row_end) veto |= policy.row_vetoes(tile_max, softmax.row_max[row]);
    }
    return veto;
  }

  const AttendProblem& problem_;
  const WorkTile& tile_;
  SharedStorage& smem_;
  Steps steps_;
  TileCopy<Config> copy_;
};

}  // namespace attnsieve::sm80
