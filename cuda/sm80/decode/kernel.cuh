// Computes        out[b, h, i] = sum_j softmax_j(scale * q[b, h, i] . k[b, h / G, j]) v[b, h / G, j]
//                 over the cached keys j of an item's walk (walk.cuh) that row i sees;
//                 lse[b, h, i] = ln sum_j exp(scale * q . k), the sink logit included.
// Roles           An item is the query vectors that share a walk. Walks are cut into chunks of a fixed
//                 number of slots; the chunks of all items, laid end to end, are dealt out evenly to
//                 the CTAs. In a chunk the warps take tiles of 16 keys in turn, each with a
//                 pipeline of its own.
// Shared memory   kDecodeStages tiles of K and V a warp; then the warps' results.
// Pipeline        A warp waits for its own copies only; two block barriers a chunk.
// Invariants      A chunk's bounds depend on its own item and on capacities; chunks are merged in
//                 their order by the CTA that arrives last: the same bits whatever else is in the
//                 batch, and however many CTAs there are.
// Not handled     fp8 caches, head_dim beyond 128.
#pragma once

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "cuda/sm80/decode/merge.cuh"

namespace attnsieve::sm80 {

template <class Element, int kHeadDim, int kColumnTiles>
struct DecodeStorage {
  typename DecodeConfig<Element, kHeadDim, kColumnTiles>::WarpStorage warps[kDecodeWarps];
  union {
    typename cub::BlockReduce<int, kDecodeThreads>::TempStorage reduce;
    typename cub::BlockScan<int, kDecodeThreads>::TempStorage scan;
  };
  int total;
  int item;
  int chunk;
  bool last;
};

// The first (item, chunk) of this CTA's share, and how many it has. Item counts differ by what only
// the device knows, so every CTA adds them up.
template <class Storage>
__device__ int find_share(const DecodeArguments& a, Storage& smem) {
  const auto chunks = [&](int item) {
    if (item >= a.plan.items) return 0;
    const DecodeItem located = locate_item(a, item);
    return chunks_of(a, DecodeWalk(a, located));
  };
  int sum = 0;
  for (int item = threadIdx.x; item < a.plan.items; item += kDecodeThreads) sum += chunks(item);
  sum = cub::BlockReduce<int, kDecodeThreads>(smem.reduce).Sum(sum);
  if (threadIdx.x == 0) smem.total = sum;
  __syncthreads();
  const int total = smem.total;
  const int ctas = static_cast<int>(gridDim.x);
  const int share = (total + ctas - 1) / ctas;
  const int begin = static_cast<int>(min(static_cast<int64_t>(blockIdx.x) * share,
                                         static_cast<int64_t>(total)));
  int passed = 0;
  for (int base = 0; base < a.plan.items; base += kDecodeThreads) {
    const int own = chunks(base + static_cast<int>(threadIdx.x));
    int before = 0;
    int tile_total = 0;
    cub::BlockScan<int, kDecodeThreads>(smem.scan).ExclusiveSum(own, before, tile_total);
    before += passed;
    if (begin >= before && begin < before + own) {
      smem.item = base + static_cast<int>(threadIdx.x);
      smem.chunk = begin - before;
    }
    passed += tile_total;
    __syncthreads();
    if (begin < passed) break;
  }
  return min(share, total - begin);
}

template <class Element, int kHeadDim, int kColumnTiles>
__global__ void __launch_bounds__(kDecodeThreads, cuda::kDecodeCtasPerSm)
    decode_kernel(const __grid_constant__ DecodeArguments a) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<DecodeStorage<Element, kHeadDim, kColumnTiles>*>(shared_memory);
  const int warp_index = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int share = find_share(a, smem);
  int item_index = smem.item;
  int chunk = smem.chunk;
  for (int i = 0; i < share; ++i) {
    const DecodeItem item = locate_item(a, item_index);
    const DecodeWalk walk(a, item);
    const int chunks = chunks_of(a, walk);
    const int64_t begin = chunk * a.plan.chunk_keys;
    const int64_t end =
        chunk + 1 == chunks ? walk.slots() : min(walk.slots(), begin + a.plan.chunk_keys);
    {
      DecodeWarp<Element, kHeadDim, kColumnTiles> warp(a, item, walk, smem.warps[warp_index]);
      warp.run(begin, end);
      publish(warp, smem.warps[warp_index]);
    }
    __syncthreads();
    const int64_t first_slot = static_cast<int64_t>(item_index) * a.plan.max_chunks;
    merge_warps<Element, kHeadDim, kColumnTiles>(a, item, first_slot + chunk, chunks == 1,
                                                 smem.warps);
    if (chunks > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        smem.last = atomicAdd(a.arrivals + item_index, 1u) == static_cast<unsigned>(chunks) - 1;
      }
      __syncthreads();
      if (smem.last) {
        __threadfence();
        merge_chunks<Element, kHeadDim>(a, item, first_slot, chunks);
      }
    }
    __syncthreads();
    if (++chunk == chunks) {
      chunk = 0;
      ++item_index;
    }
  }
}

}  // namespace attnsieve::sm80
