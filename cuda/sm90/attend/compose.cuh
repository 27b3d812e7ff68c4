// How a warp composes a tile of K or V from pieces: which keys each lane copies, what the consumers
// are told of the tile, and the bulk copies themselves.
#pragma once

#include "cuda/sm90/attend/iterator.cuh"

namespace attnsieve::sm90 {

enum class Operand { kKeys, kValues };

template <class Config, class BlockIterator>
class TileComposer {
  using Element = typename Config::Element;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kNoKey = Config::kNoKey;
  static constexpr int kLanesPerPiece = Config::kInterleaved ? 1 : Config::kSlices;

 public:
  // What this lane copies of a tile.
  struct Piece {
    int key;  // first key, kNoKey for none, ~key where its page is missing
    int page;
  };

  __device__ TileComposer(const AttendArguments& arguments, SharedStorage& smem, int lane)
      : a_(arguments), smem_(smem), lane_(lane) {
    offset_ = lane / kLanesPerPiece * a_.piece_keys;
  }

  __device__ bool is_leader() const { return lane_ == 0; }
  // Keys of this lane's piece into the tile.
  __device__ int offset() const { return offset_; }
  static __device__ bool is_real(int key) { return key >= 0 && key != kNoKey; }

  // Starts the load that resolves this lane's part of a tile.
  __device__ int fetch(const Work& work, const BlockIterator& iterator, int tile) const {
    if (offset_ >= Config::kTileN || tile >= work.tiles) return -1;
    return iterator.fetch(iterator.slot(tile, offset_));
  }

  // Starts the load of the page number where K and V are paged.
  __device__ Piece resolve(const Work& work, const BlockIterator& iterator, int tile,
                           int fetched) const {
    if (offset_ >= Config::kTileN || tile >= work.tiles) return {kNoKey, 0};
    return page_of(work, iterator.key(a_, work, iterator.slot(tile, offset_), fetched));
  }
  __device__ Piece page_of(const Work& work, int key) const {
    const PagedKv& paged = a_.problem.paged;
    if (paged.block_table == nullptr || key == kNoKey) return {key, 0};
    return {key, paged.block_table[work.batch * paged.table_stride_batch + key / paged.page_size]};
  }

  // Marks a piece whose page is missing: it counts as part of its tile, but there is nothing to read.
  __device__ void check_page(Piece* piece) const {
    const PagedKv& paged = a_.problem.paged;
    if (paged.block_table != nullptr && piece->key != kNoKey &&
        (piece->page < 0 || piece->page >= paged.num_pages)) {
      piece->key = ~piece->key;
    }
  }

  // Whether some row does not see some key of the piece.
  __device__ bool is_partial(const Work& work, const Piece& piece) const {
    return piece.key < work.full_begin || piece.key + a_.piece_keys > work.full_end;
  }

  // The flags of the tile that the warp's pieces make.
  __device__ int inspect(const Work& work, const Piece& piece) const {
    const bool partial = is_active() && is_partial(work, piece);
    int flags = 0;
    if (__any_sync(0xffffffffu, partial)) {
      flags = Config::kMaskedTile;
      if (__any_sync(0xffffffffu, partial && is_real(piece.key))) flags |= Config::kCheckedTile;
      if (!__any_sync(0xffffffffu, offset_ < Config::kStepKeys && piece.key != kNoKey)) {
        flags |= Config::kPaddedStep;
      }
    }
    return flags;
  }

  // Where a piece lies in K and V.
  struct Coordinates {
    int row;
    int outer;  // batch or page
  };

  // A piece without keys is copied from behind the tensor: zeros, no traffic, the same bytes.
  __device__ Coordinates coordinates(const Work& work, const Piece& piece) const {
    if (!is_real(piece.key)) return {kNoKey, 0};
    const PagedKv& paged = a_.problem.paged;
    if (paged.block_table != nullptr) return {piece.key % paged.page_size, piece.page};
    return {work.token_k + piece.key, a_.problem.varlen.cu_seqlens_k != nullptr ? 0 : work.batch};
  }

  // Fills a stage that is free, this lane's piece among the others.
  template <Operand kOperand>
  __device__ void fill(int kv_head, const Coordinates& from, int key, int flags, int stage,
                       TransactionBarrier& full) const {
    constexpr bool kKeys = kOperand == Operand::kKeys;
    Element* const tile = (kKeys ? smem_.k : smem_.v) + stage * Config::kTileElements;
    record(kKeys ? smem_.k_record[stage] : smem_.v_record[stage], key, flags);
    if (is_leader()) full.arrive_expect(Config::kTileBytes);
    __syncwarp();
    if (is_active()) copy_piece(kOperand, tile, full, offset_, slice(), kv_head, from);
  }

  // The keys of a piece, by granule.
  __device__ void record_keys(typename Config::TileRecord& record, int offset,
                              int first_key) const {
#pragma unroll 1
    for (int granule = 0; granule < a_.piece_keys; granule += Config::kGranuleKeys) {
      int key = first_key;
      if (key < 0)
        key -= granule;  // ~(k + granule) = ~k - granule
      else if (key != kNoKey)
        key += granule;
      record.key[(offset + granule) / Config::kGranuleKeys] = key;
    }
  }

  // Copies a piece to `offset` keys into the tile: all slices where the tile is interleaved, else as
  // many from `slice` on as the box of the map has.
  __device__ void copy_piece(Operand operand, Element* tile, TransactionBarrier& full, int offset,
                             int slice, int kv_head, const Coordinates& from) const {
    const CUtensorMap& map = operand == Operand::kKeys ? a_.k : a_.v;
    const CUtensorMap& group_map = operand == Operand::kKeys ? a_.k_groups : a_.v_groups;
    if constexpr (!Config::kInterleaved) {
      copy_box_5d(tile + (slice * Config::kTileN + offset) * Config::kSliceColumns, &map, full, 0,
                  from.row, slice, kv_head, from.outer);
    } else {
      Element* target = tile + offset * Config::kHeadDim;
      const int64_t group_row = static_cast<int64_t>(from.outer) * a_.rows_per_batch + from.row;
      if (group_row % 8 == 0 && group_row + a_.piece_keys <= a_.group_rows) {
        copy_box_5d(target, &group_map, full, 0, 0, 0, static_cast<int>(group_row / 8),
                    from.outer * a_.heads_per_batch + kv_head);
        return;
      }
#pragma unroll 1
      for (int rows = 0; rows < a_.piece_keys; rows += 8) {
        copy_box_5d(target, &map, full, 0, from.row + rows, 0, kv_head, from.outer);
        target += 8 * Config::kHeadDim;
      }
    }
  }

  // Copies the 64 query rows of one warpgroup into a tile of Q.
  __device__ void copy_queries(const Work& work, int warpgroup, int tile) const {
    const int head = work.head + (a_.pack_heads ? warpgroup : 0);
    const int row = work.token_q + work.row + (a_.pack_heads ? 0 : warpgroup * kWarpgroupRows);
    const int batch = a_.problem.varlen.cu_seqlens_q != nullptr ? 0 : work.batch;
    TransactionBarrier& full = smem_.q_full[tile];
    full.arrive_expect(Config::kQueryBytes);
    Element* const target = smem_.q + tile * Config::kQueryElements;
#pragma unroll
    for (int slice = 0; slice < Config::kSlices; ++slice) {
      copy_box_4d(target + slice * kWarpgroupRows * Config::kSliceColumns, &a_.q, full,
                  slice * Config::kSliceColumns, row, head, batch);
    }
  }

 private:
  __device__ int slice() const { return lane_ % kLanesPerPiece; }
  __device__ bool is_active() const { return offset_ < Config::kTileN; }

  // What the consumers will want to know of a tile: written before its barrier is armed.
  __device__ void record(typename Config::TileRecord& record, int first_key, int flags) const {
    if (flags != 0 && is_active() && slice() == 0) record_keys(record, offset_, first_key);
    if (is_leader()) record.flags = flags;
    __syncwarp();
  }

 protected:
  const AttendArguments& a_;
  SharedStorage& smem_;

 private:
  int lane_;
  int offset_;
};

}  // namespace attnsieve::sm90
