// Feed: who refills the stages that the mainloop has freed.
//   prepare()  while Q K^T of the current tile runs
//   refill()   once it is complete: its stage of K is free, and the stage of V before last
// A self-fed warpgroup has no producer warps beside it. It shares an SM with others of its kind,
// which compute while its copies are under way. With lists of 64 x 64 blocks three such CTAs take
// 1.43 M cycles where two with producer warps take 1.66 M (H200, 2026-11-22, density 0.05; about half
// of the difference lies at the start and the end of an item).
#pragma once

#include "cuda/sm90/attend/compose.cuh"
#include "cuda/sm90/attend/schedule.cuh"

namespace attnsieve::sm90 {

// Producer warps see to it.
struct ProducersFeed {
  __device__ void prepare() {}
  __device__ void refill() {}
};

// Warp 0 copies the tiles of K, warp 1 those of V, a tile later. All warps meet at the next MMA, so
// a copy has to be short: what it needs stands ready in shared memory, where warp 0 resolves 32
// pieces at once, one a lane, from list entries fetched 32 pieces before.
template <class Config, class BlockIterator>
class SelfFeed {
  using Element = typename Config::Element;
  using Composer = TileComposer<Config, BlockIterator>;
  using PieceRecord = typename Config::PieceRecord;
  static_assert(Config::kSteps == 1);
  // Named barriers of the warpgroup, by parity of the tile: a warp is at most one tile ahead.
  static constexpr int kRefillBarrier = 10;

 public:
  __device__ SelfFeed(const AttendArguments& arguments, typename Config::SharedStorage& smem)
      : a_(arguments), smem_(smem), warp_(static_cast<int>(threadIdx.x) / kWarpThreads) {}

  // Warp 0, before the others look at shared memory: finds the CTA's work item and starts its first
  // copies.
  __device__ void start() {
    const Composer composer = make_composer();
    Work item;
    item.tiles = -1;
    BlockIterator iterator;
    if (locate<Config>(a_, blockIdx.x, &item)) {
      if (composer.is_leader()) composer.copy_queries(item, 0, 0);
      item.tiles = iterator.start(a_, item);
    }
    if (composer.is_leader()) {
      smem_.work[0] = item;
      smem_.template iterator<BlockIterator>(0) = iterator;
    }
    __syncwarp();
    if (item.tiles <= 0) return;
    fetched_ = fetch(0, opaque_lane());
    resolve(0);
    copy(Operand::kKeys, 0, load_record(0));
  }

  __device__ void prepare() {
    if (warp_ < 2) record_ = load_record(tile_ - warp_);
  }

  // Behind the barrier every warp is done with what the copies overwrite: K of this tile, V of the
  // tile before the last.
  __device__ void refill() {
    const int barrier = kRefillBarrier + tile_ % 2;
    if (warp_ >= 2) {
      named_barrier_arrive(barrier, kWarpgroupThreads);
    } else {
      named_barrier_sync(barrier, kWarpgroupThreads);
      copy(warp_ == 0 ? Operand::kKeys : Operand::kValues, tile_ - warp_, record_);
      if (warp_ == 0 && (record_.piece.flags & Config::kLastOfBatch) != 0) resolve(tile_ + 1);
    }
    ++tile_;
  }

 private:
  // Opaque, or what follows from it would be kept in registers through the main loop.
  static __device__ int opaque_lane() {
    int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    asm volatile("" : "+r"(lane));
    return lane;
  }
  __device__ Composer make_composer() const { return Composer(a_, smem_, opaque_lane()); }
  __device__ const Work& work() const { return smem_.work[0]; }
  __device__ const BlockIterator& iterator() const {
    return smem_.template iterator<BlockIterator>(0);
  }

  // Tiles whose pieces are resolved together. Two batches are kept: V is a tile behind K.
  __device__ int batch_tiles() const {
    return (kWarpThreads << a_.log2_piece_keys) / Config::kTileN;
  }
  // The records of a tile's pieces, in order.
  __device__ PieceRecord* records(int tile) const {
    const auto piece = static_cast<unsigned>(tile * Config::kTileN) >> a_.log2_piece_keys;
    return smem_.pieces + piece % (2 * kWarpThreads);
  }

  // The list entry of a lane's piece in the batch from `first_tile` on.
  __device__ int fetch(int first_tile, int lane) const {
    const int key = lane << a_.log2_piece_keys;
    const int tile = first_tile + key / Config::kTileN;
    if (tile >= work().tiles) return -1;
    return iterator().fetch(iterator().slot(tile, key % Config::kTileN));
  }

  __device__ void resolve(int first_tile) {
    const Composer composer = make_composer();
    const int lane = opaque_lane();
    const int key = lane << a_.log2_piece_keys;
    const int tile = first_tile + key / Config::kTileN;
    typename Composer::Piece piece{Config::kNoKey, 0};
    if (tile < work().tiles) {
      const int slot = iterator().slot(tile, key % Config::kTileN);
      piece = composer.page_of(work(), iterator().key(a_, work(), slot, fetched_));
    }
    fetched_ = fetch(first_tile + batch_tiles(), lane);
    composer.check_page(&piece);
    const bool partial = composer.is_partial(work(), piece);
    const unsigned masked = __ballot_sync(0xffffffffu, partial);
    const unsigned checked = __ballot_sync(0xffffffffu, partial && Composer::is_real(piece.key));
    const int pieces = Config::kTileN >> a_.log2_piece_keys;  // of a tile
    const unsigned own = ((1u << pieces) - 1) << (lane & ~(pieces - 1));
    int flags = pieces > 1 || a_.box_slices < Config::kSlices ? Config::kComposedTile : 0;
    if ((masked & own) != 0) flags |= Config::kMaskedTile;
    if ((checked & own) != 0) flags |= Config::kCheckedTile;
    if (lane + pieces >= kWarpThreads) flags |= Config::kLastOfBatch;
    if (tile >= work().tiles) flags |= Config::kNoTile;
    const typename Composer::Coordinates from = composer.coordinates(work(), piece);
    records(first_tile)[lane] = {from.row, from.outer, piece.key, flags};
    __syncwarp();
  }

  // What a copy needs.
  struct Record {
    PieceRecord piece;  // the tile's first
    int kv_head;
  };
  __device__ Record load_record(int tile) const { return {*records(tile), work().kv_head}; }

  // By one lane.
  __device__ void copy(Operand operand, int tile, const Record& record) const {
    const Composer composer = make_composer();
    if (!composer.is_leader() || (record.piece.flags & Config::kNoTile) != 0) return;
    const bool keys = operand == Operand::kKeys;
    const int stage = tile % 2;
    auto& full = keys ? smem_.k_full[0] : smem_.v_full[stage];
    auto& tile_record = keys ? smem_.k_record[0] : smem_.v_record[stage];
    Element* const target = keys ? smem_.k : smem_.v + stage * Config::kTileElements;
    tile_record.flags = record.piece.flags;
    const PieceRecord* const pieces = records(tile);
    if ((record.piece.flags & Config::kMaskedTile) != 0) {
      for (int offset = 0; offset < Config::kTileN; offset += a_.piece_keys) {
        composer.record_keys(tile_record, offset, pieces[offset >> a_.log2_piece_keys].key);
      }
    }
    full.arrive_expect(Config::kTileBytes);
    composer.copy_piece(operand, target, full, 0, 0, record.kv_head,
                        {record.piece.row, record.piece.outer});
    if ((record.piece.flags & Config::kComposedTile) == 0) return;
    for (int offset = 0; offset < Config::kTileN; offset += a_.piece_keys) {
      const PieceRecord piece = pieces[offset >> a_.log2_piece_keys];
      for (int slice = 0; slice < Config::kSlices; slice += a_.box_slices) {
        if (offset + slice == 0) continue;
        composer.copy_piece(operand, target, full, offset, slice, record.kv_head,
                            {piece.row, piece.outer});
      }
    }
  }

  const AttendArguments& a_;
  typename Config::SharedStorage& smem_;
  int warp_;
  int tile_ = 1;  // of K copied next
  int fetched_;  // of this lane's piece in the next batch
  Record record_;
};

}  // namespace attnsieve::sm90
