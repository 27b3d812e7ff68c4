// Computes        out[b, h, i] = sum_j softmax_j(scale * q[b, h, i] . k[b, h / G, j]) v[b, h / G, j]
//                 over the cached keys j of an item's walk (walk.cuh) that row i sees;
//                 lse[b, h, i] = ln sum_j exp(scale * q . k), the sink logit included.
// Roles           An item is the query vectors that share a walk. Walks are cut into chunks of about
//                 as many slots; the chunks of all items, laid end to end, are dealt out evenly to
//                 the CTAs. In a chunk the warps take tiles of 16 keys in turn, each with a
//                 pipeline of its own. A CTA that has all chunks of a group leaves one result for
//                 them: what it writes costs the reads of keys far more than its bytes.
// Shared memory   kDecodeStages tiles of K and V a warp; beside them the warps' results, then the
//                 weights of chunks; the tasks of this item and of the next.
// Pipeline        A warp waits for its own copies only. The first tiles of the next chunk are on
//                 their way while this one's results are merged.
// Invariants      A chunk's bounds depend on its own item and on capacities; chunks are merged in
//                 groups and in their order, whoever does it, the last by the CTA that arrives last:
//                 the same bits whatever else is in the batch, and however many CTAs there are.
// Not handled     head_dim beyond 128.
#pragma once

#include <cub/block/block_scan.cuh>

#include "cuda/sm80/decode/merge.cuh"

namespace attnsieve::sm80 {

template <class Config>
struct DecodeStorage {
  typename Config::Stages stages[kDecodeWarps];
  union {
    typename Config::Merge merges[kDecodeWarps];
    ChunkWeights<Config> weights;
    typename cub::BlockScan<int, kDecodeThreads>::TempStorage scan;
  };
  DecodeTask tasks[2];  // items take turns
  int item;
  int chunk;
  bool last;
  bool singles;  // no CTA has more than one chunk
};

// The first (item, chunk) of this CTA's share, and how many it has. Item counts differ by what only
// the device knows, so every CTA adds them up.
template <class Config>
__device__ int find_share(const DecodeArguments& a, DecodeStorage<Config>& smem) {
  using Scan = cub::BlockScan<int, kDecodeThreads>;
  const int thread = static_cast<int>(threadIdx.x);
  const int items = a.plan.items;
  // Chunks of the kDecodeThreads items from `base` on: this thread's, before it, of all.
  struct Part {
    int own;
    int before;
    int all;
  };
  const auto part_of = [&](int base) {
    Part part{0, 0, 0};
    if (base + thread < items)
      part.own = make_task<typename Config::Stored>(a, base + thread).chunks(a.plan);
    __syncthreads();
    Scan(smem.scan).ExclusiveSum(part.own, part.before, part.all);
    return part;
  };
  Part part = part_of(0);
  int total = part.all;
  for (int base = kDecodeThreads; base < items; base += kDecodeThreads) total += part_of(base).all;
  const int ctas = static_cast<int>(gridDim.x);
  if (thread == 0) smem.singles = total <= ctas;
  const auto first_of = [&](unsigned cta) {
    return static_cast<int>(static_cast<uint64_t>(total) * cta / static_cast<unsigned>(ctas));
  };
  const int begin = first_of(blockIdx.x);
  const int share = first_of(blockIdx.x + 1) - begin;
  if (share == 0) return 0;
  int passed = 0;
  for (int base = 0;; base += kDecodeThreads) {
    if (base > 0 || items > kDecodeThreads) part = part_of(base);
    const int before = passed + part.before;
    if (begin >= before && begin < before + part.own) {
      smem.item = base + thread;
      smem.chunk = begin - before;
    }
    passed += part.all;
    if (begin < passed) break;
  }
  __syncthreads();
  return share;
}

template <class Types, int kHeadDim, int kColumnTiles>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeCtasPerSm)
    decode_kernel(const __grid_constant__ DecodeArguments a) {
  using Config = DecodeConfig<Types, kHeadDim, kColumnTiles>;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<DecodeStorage<Config>*>(shared_memory);
  const int warp_index = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int share = find_share(a, smem);
  if (share == 0) return;
  int item = smem.item;
  int chunk = smem.chunk;
  int turn = 0;
  int entered = chunk;  // first chunk of the item that is this CTA's
  ChunkGroup<Config> group;
  if (threadIdx.x == 0) smem.tasks[0] = make_task<typename Config::Stored>(a, item);
  __syncthreads();
  DecodeWarp<Config> warp(a, smem.stages[warp_index]);
  const auto start = [&](const DecodeTask& task, int next_chunk) {
    warp.start(task, task.chunk_begin(a.plan, next_chunk),
               task.chunk_begin(a.plan, next_chunk + 1));
  };
  start(smem.tasks[0], chunk);
  for (int i = 0; i < share; ++i) {
    const DecodeTask& task = smem.tasks[turn];
    const int chunks = task.chunks(a.plan);
    const bool ends_item = chunk + 1 == chunks;
    const int next_turn = turn ^ static_cast<int>(ends_item);
    if (ends_item && i + 1 < share && threadIdx.x == 0) {
      smem.tasks[next_turn] = make_task<typename Config::Stored>(a, item + 1);
    }
    {
      WarpResult<Config> result;
      warp.run(result);
      publish(result, smem.merges[warp_index]);
    }
    __syncthreads();
    if (i + 1 < share) start(smem.tasks[next_turn], ends_item ? 0 : chunk + 1);
    const int64_t first_slot = static_cast<int64_t>(item) * a.plan.max_chunks;
    const int group_begin = chunk / kGroupChunks * kGroupChunks;
    const int group_end = min(group_begin + kGroupChunks, chunks);
    const bool grouped = Config::kMergesGroups && group_begin >= entered &&
                         group_end <= chunk + share - i;  // all by this CTA
    const bool whole = chunks == 1 || (grouped && group_end - group_begin == chunks);
    if (grouped) {
      if (chunk == group_begin) group.clear();
      group.add(a, task.item, smem.merges);
      if (chunk + 1 == group_end) {
        group.store(a, task.item, whole, first_slot + group_begin, chunk - group_begin);
      }
    } else {
      merge_warps<Config>(a, task.item, whole, first_slot + chunk, smem.merges);
    }
    const bool leaves_item = ends_item || i + 1 == share;
    if (leaves_item && !whole) {
      __syncthreads();
      if (threadIdx.x == 0) {
        const auto done = static_cast<unsigned>(chunk + 1 - entered);
        __threadfence();
        smem.last = atomicAdd(a.arrivals + item, done) + done == static_cast<unsigned>(chunks);
        __threadfence();
      }
      __syncthreads();
      if (smem.last) {
        merge_chunks<Config>(a, task.item, first_slot, chunks, smem.singles, smem.weights);
      }
    }
    __syncthreads();
    turn = next_turn;
    ++chunk;
    if (!ends_item) continue;
    chunk = 0;
    entered = 0;
    ++item;
  }
}

}  // namespace attnsieve::sm80
