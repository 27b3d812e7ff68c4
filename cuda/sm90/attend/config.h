// Everything about the sm_90 attend kernel that is fixed at compile time.
#pragma once

// m64n96 and the other shapes between the powers of two.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "cuda/common/ptx_sm90.cuh"
#include "cuda/common/skip_policy.cuh"
#include "cuda/common/work_tile.cuh"
#include "cuda/sm90/attend/arguments.h"

namespace attnsieve::sm90 {

inline constexpr int kWarpgroupThreads = 128;
static_assert(kWarpgroupRows == kGroupRows, "a warpgroup owns the rows that vote together");

// One work item, as the producer hands it to the warpgroups.
struct Work {
  int tiles;  // KV tiles to visit; negative: no more work
  int batch;
  int head;  // of the first warpgroup
  int head_end;  // heads from here on do not belong to the item's KV head
  int kv_head;
  int row;  // first query row of the first warpgroup; may be negative
  int token_q;
  int seqlen_q;
  int token_k;
  int seqlen_k;
  int begin_shift;  // query row r sees keys [max(0, r + begin_shift), min(seqlen_k, r + end_shift))
  int end_shift;
  int visible_begin;  // keys that some row of the item sees
  int visible_end;
  int full_begin;  // keys that every row of the item sees
  int full_end;

  __device__ int first_key(int query_row) const { return max(0, query_row + begin_shift); }
  __device__ int end_key(int query_row) const { return min(seqlen_k, query_row + end_shift); }
};

// kWarpgroups_ consumer warpgroups of 64 rows; kTileN_ keys a tile; kStepKeys_ keys an
// online-softmax step; stages of K, V and Q; CTAs an SM. An interleaved tile keeps the slices of 8
// rows together, so that a box of any multiple of 8 rows is one bulk copy. A self-fed warpgroup has
// no producer warps beside it: its first warp starts the copies. Voted: warpgroups may skip tiles,
// and values that none of them wants are not copied.
template <class Element_, int kHeadDim_, int kWarpgroups_, int kTileN_, int kStepKeys_,
          int kStagesK_, int kStagesV_, int kStagesQ_, int kCtasPerSm_, bool kInterleaved_,
          bool kSelfFed_ = false, bool kVoted_ = false>
struct AttendConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kStepKeys = kStepKeys_;
  static constexpr int kSteps = kTileN / kStepKeys;
  static_assert(kSteps <= 2);
  static constexpr int kStagesK = kStagesK_;
  static constexpr int kStagesV = kStagesV_;
  static constexpr int kStagesQ = kStagesQ_;
  static constexpr int kCtasPerSm = kCtasPerSm_;
  static constexpr bool kInterleaved = kInterleaved_;
  static constexpr bool kSelfFed = kSelfFed_;
  static constexpr bool kVoted = kVoted_;
  using SkipPolicy = std::conditional_t<kVoted, ThresholdSkip, NoSkip>;
  static_assert(!kSelfFed || (kWarpgroups == 1 && kStagesK == 1 && kStagesV == 2 && kStagesQ == 1));
  static constexpr int kConsumerThreads = kWarpgroups * kWarpgroupThreads;
  static constexpr int kThreads = kConsumerThreads + (kSelfFed ? 0 : kWarpgroupThreads);

  // Registers a thread after the warp roles have split: what the launch gave out, redistributed.
  // Two warpgroups alone on an SM have as many as a thread can address.
  static constexpr bool kRedistributes = kCtasPerSm * (kWarpgroups + 1) > 2;
  static constexpr int kProducerRegisters = kWarpgroups == 1 && kHeadDim > 96 ? 56 : 72;
  static constexpr int kConsumerRegisters =
      ((kWarpgroups == 1 ? 256 : 504) - kProducerRegisters) / kWarpgroups;

  // A slice is as wide as one swizzle atom: 64 columns (128 bytes), or 32 where head_dim asks.
  static constexpr int kSliceColumns = slice_columns(kHeadDim);
  static constexpr int kSlices = kHeadDim / kSliceColumns;
  static_assert(kHeadDim % kSliceColumns == 0);
  static_assert(!kInterleaved || kSlices > 1, "one slice composes as it is");
  // Keys whose position a tile's record tells apart: the finest piece.
  static constexpr int kGranuleKeys = kInterleaved || kSlices == 1 ? 16 : 64;
  static constexpr int kGranules = kTileN / kGranuleKeys;

  static constexpr int kTileElements = kTileN * kHeadDim;
  static constexpr int kTileBytes = kTileElements * static_cast<int>(sizeof(Element));
  static constexpr int kQueryElements = kWarpgroupRows * kHeadDim;
  static constexpr int kQueryBytes = kQueryElements * static_cast<int>(sizeof(Element));

  using AtomK = std::conditional_t<kSliceColumns == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                   cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using AtomV = std::conditional_t<kSliceColumns == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                   cute::GMMA::Layout_MN_SW64_Atom<Element>>;
  template <class Interleaved, class Plain>
  using Order = std::conditional_t<kInterleaved, Interleaved, Plain>;
  using LayoutQ =
      decltype(cute::tile_to_shape(AtomK{},
                                   cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kHeadDim>,
                                               cute::Int<kStagesQ * kWarpgroups>>{},
                                   cute::Step<cute::_1, cute::_2, cute::_3>{}));
  using LayoutK = decltype(cute::tile_to_shape(
      AtomK{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kStagesK>>{},
      Order<cute::Step<cute::_2, cute::_1, cute::_3>, cute::Step<cute::_1, cute::_2, cute::_3>>{}));
  using LayoutV = decltype(cute::tile_to_shape(
      AtomV{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>, cute::Int<kStagesV>>{},
      Order<cute::Step<cute::_1, cute::_2, cute::_3>, cute::Step<cute::_2, cute::_1, cute::_3>>{}));
  using MmaQK = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kTileN>, cute::Int<kHeadDim>>,
          cute::GMMA::Major::K, cute::GMMA::Major::K>()));
  using MmaPV = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<
          Element, Element, float,
          cute::Shape<cute::Int<kWarpgroupRows>, cute::Int<kHeadDim>, cute::Int<kTileN>>,
          cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  // Inside a slice, the 16-byte chunks of a row are XORed with this.
  static __device__ int swizzle(int row) { return kSliceColumns == 64 ? row % 8 : row / 2 % 4; }
  // Element offset of (row, column) in a tile of `rows` rows: slices behind each other, or the
  // slices of every 8 rows together.
  static __device__ int offset_in_tile(int row, int column, int rows, bool interleaved) {
    const int slice = column / kSliceColumns;
    const int slice_row =
        interleaved ? (row / 8 * kSlices + slice) * 8 + row % 8 : slice * rows + row;
    const int in_slice = column % kSliceColumns;
    return slice_row * kSliceColumns + ((in_slice / 8 ^ swizzle(row)) * 8 + in_slice % 8);
  }

  // What the consumers need to know of a tile beyond its bytes.
  struct TileRecord {
    int flags;
    // Where the tile is masked: first key of each granule, kNoKey where there is none, ~key where
    // its page is missing and all its keys are masked.
    int key[kGranules];
  };
  static constexpr int kMaskedTile = 1;  // some row does not see some key
  static constexpr int kCheckedTile = 2;  // and V holds something in that key's row
  static constexpr int kPaddedStep = 4;  // the first of two softmax steps is all padding
  static constexpr int kNoKey = kMaxTokens;

  // Where a piece of a tile lies, resolved ahead by a self-fed warpgroup.
  struct alignas(16) PieceRecord {
    int row;
    int outer;  // batch or page
    int key;  // as in TileRecord
    int flags;  // of its tile: those above, and
  };
  static constexpr int kComposedTile = 8;  // takes more than one copy
  static constexpr int kLastOfBatch = 16;  // the next tiles have to be resolved
  static constexpr int kNoTile = 32;  // behind the last

  struct CheckRequest {
    int stage;  // of V; kStagesV: no more work
    int slot;  // of its full barrier
    uint32_t parity;
    int non_finite;  // the answer
  };
  static constexpr int kCheckSlots = 8;
  // Voted: tiles whose votes and value barriers are kept apart. K of a tile is copied once the values
  // kVotesBehind tiles before are there or known to be skipped, and their stage was free for that: so
  // nobody is a whole ring ahead of another.
  static constexpr int kVoteSlots = kStagesV == 1 ? 4 : 8;
  static constexpr int kVotesBehind = kVoteSlots - kStagesV;
  static_assert(!kVoted || (kVoteSlots % kStagesV == 0 && kStagesK <= kVotesBehind));
  static constexpr int kValueSlots = kVoted ? kVoteSlots : kStagesV;
  static constexpr int kWorkSlots = 4;
  static constexpr int kIteratorBytes = 32;
  static_assert(kStagesV < kCheckSlots, "a request is answered before its slot comes round again");

  struct SharedStorage {
    alignas(1024) Element q[kStagesQ * kWarpgroups * kQueryElements];  // and the output tile
    alignas(1024) Element k[kStagesK * kTileElements];
    alignas(1024) Element v[kStagesV * kTileElements];
    TransactionBarrier k_full[kStagesK], k_empty[kStagesK];
    TransactionBarrier v_full[kValueSlots], v_empty[kValueSlots];
    TransactionBarrier q_full[kStagesQ * kWarpgroups], q_empty[kStagesQ * kWarpgroups];
    TransactionBarrier work_full[kWorkSlots], work_empty[kWorkSlots];
    TransactionBarrier item_ending;
    TransactionBarrier check_full[kCheckSlots], check_done[kCheckSlots];
    TileRecord k_record[kStagesK];
    TileRecord v_record[kStagesV];
    Work work[kWorkSlots];
    CheckRequest check[kCheckSlots];
    uint32_t votes[kVoted ? kWarpgroups : 1][kVoteSlots];
    PieceRecord pieces[kSelfFed ? 2 * kWarpThreads : 1];
    alignas(8) unsigned char iterators[kWorkSlots][kIteratorBytes];

    template <class BlockIterator>
    __device__ BlockIterator& iterator(int slot) {
      static_assert(sizeof(BlockIterator) <= kIteratorBytes);
      return reinterpret_cast<BlockIterator&>(iterators[slot]);
    }
  };
  static constexpr int kSmBytes = 228 * 1024;  // 1 KB of it is reserved for each CTA
  static_assert(kCtasPerSm * (sizeof(SharedStorage) + 1024) <= kSmBytes);
};

// Position in a ring of barriers. Producers start with phase 1: an unused slot counts as empty.
template <int kSlots>
struct RingPosition {
  int slot = 0;
  uint32_t phase;

  __device__ explicit RingPosition(uint32_t first_phase) : phase(first_phase) {}
  __device__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

}  // namespace attnsieve::sm90
