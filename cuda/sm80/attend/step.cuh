// A step: the kTileN keys that one online-softmax update takes in. Which keys they are, how their
// rows get into shared memory, and which of them the whole group sees.
//   Keys             names a step while the mainloop works on it
//   kSpans           runs of kSpanKeys consecutive keys that make up a step, in its order
//   first_key()      first key of a span; behind every sequence where the step has none
//   next()           takes the iterator's next step
//   load()           starts the copies of the step's rows of K or V
#pragma once

#include "cuda/common/mask.cuh"
#include "cuda/common/piece_iterator.cuh"
#include "cuda/sm80/attend/load.cuh"

namespace attnsieve::sm80 {

// Steps of one or two units whose keys lie behind each other in K and V.
template <class Config>
class UnitSteps {
 public:
  using Element = typename Config::Element;
  static constexpr int kStepUnits = Config::kStepUnits;
  static constexpr int kSpans = kStepUnits;
  static constexpr int kSpanKeys = kUnitKeys;
  struct Keys {
    int unit[kStepUnits];
  };

  __device__ UnitSteps(const AttendProblem&, const WorkTile& tile, typename Config::SharedStorage&)
      : tile_(tile) {}

  __device__ void begin_tile() {}

  // The next `units` units of the iterator as the step `stage` of a tile.
  template <class BlockIterator>
  __device__ Keys next(BlockIterator& iterator, int /*stage*/, int units) const {
    Keys keys;
#pragma unroll
    for (int unit = 0; unit < kStepUnits; ++unit) {
      keys.unit[unit] = unit < units ? iterator.next() : kNoUnit;
    }
    return keys;
  }

  __device__ int first_key(const Keys& keys, int span) const {
    return span == 0 ? keys.unit[0] : keys.unit[kStepUnits - 1];
  }

  // True if some row of the group does not see some key of the step.
  __device__ bool needs_step_mask(const Keys& keys) const {
    bool masked = false;
#pragma unroll
    for (int unit = 0; unit < kStepUnits; ++unit) masked |= needs_mask(tile_, keys.unit[unit]);
    return masked;
  }

  __device__ void load(const TileCopy<Config>& copy, Element* smem, const Element* base,
                       const HeadTensor& tensor, int /*stage*/, const Keys& keys) const {
#pragma unroll
    for (int unit = 0; unit < kStepUnits; ++unit) {
      const int key = keys.unit[unit];
      copy.load(smem + unit * kUnitKeys * Config::kHeadDim, base + key * tensor.stride_row,
                tensor.stride_row, tile_.seqlen_k - key);
    }
  }

 private:
  static constexpr int kNoUnit = kMaxTokens;

  const WorkTile& tile_;
};

// Steps of one unit made of pieces. Every warp keeps a table of its own, so that no barrier stands
// between finding the pieces and copying them. The first keys of a tile outlive the start of the
// next tile's copies, hence two sets; its rows are no longer needed by then.
template <class Config>
class PieceSteps {
 public:
  using Element = typename Config::Element;
  static constexpr int kSpans = kPieces;
  static constexpr int kSpanKeys = kPieceKeys;
  static_assert(Config::kStepUnits == 1);
  struct Keys {
    int set;
    int stage;
  };

  __device__ PieceSteps(const AttendProblem& problem, const WorkTile& tile,
                        typename Config::SharedStorage& smem)
      : problem_(problem), tile_(tile), table_(smem.pieces[threadIdx.x / kWarpThreads]) {}

  // All lanes have started the copies of the tile before last.
  __device__ void begin_tile() {
    set_ ^= 1;
    __syncwarp();
  }

  template <class BlockIterator>
  __device__ Keys next(BlockIterator& iterator, int stage, int units) const {
    const int lane = threadIdx.x % kWarpThreads;
    if (units > 0) {
      int key = iterator.next();
      if (lane < kPieces) {
        table_.rows[stage][lane] = locate_piece(problem_.paged, tile_.batch, &key);
        table_.keys[set_][stage][lane] = key;
      }
      __syncwarp();
    }
    return {set_, stage};
  }

  __device__ int first_key(const Keys& keys, int span) const {
    return table_.keys[keys.set][keys.stage][span];
  }

  __device__ bool needs_step_mask(const Keys& keys) const {
    bool masked = false;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int key = first_key(keys, piece);
      masked |= key < tile_.full_begin || key + kPieceKeys > tile_.full_end;
    }
    return masked;
  }

  __device__ void load(const TileCopy<Config>& copy, Element* smem, const Element* base,
                       const HeadTensor& tensor, int stage, const Keys& keys) const {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const PieceRows rows = table_.rows[stage][piece];
      copy.template load<kPieceKeys>(
          copy.rows_from(smem, piece * kPieceKeys),
          base + rows.page * tensor.stride_batch + rows.row * tensor.stride_row, tensor.stride_row,
          tile_.seqlen_k - first_key(keys, piece));
    }
  }

 private:
  const AttendProblem& problem_;
  const WorkTile& tile_;
  typename Config::PieceTable& table_;
  int set_ = 0;
};

}  // namespace attnsieve::sm80
