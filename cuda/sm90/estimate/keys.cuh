// How keys and their scales come into the ring of the sm_90 estimator.
#pragma once

#include "cuda/common/numeric.cuh"
#include "cuda/sm80/estimate/order.cuh"
#include "cuda/sm90/estimate/arguments.h"
#include "cuda/sm90/estimate/config.h"

namespace attnsieve::sm90 {

using namespace cute;

// Scales of a stage's keys, by `threads` threads, as SharedStorage::scales has them.
template <class Config>
__device__ __forceinline__ void load_scales(const CodedRows& k, const EstimateSequence& sequence,
                                            int kv_head, int stage, int thread, int threads,
                                            float* to) {
  constexpr int kUnits = Config::kTileUnits;
  const float* from = sequence.k_scales + kv_head * k.num_scales;
  const float factor = k.bits == 4 ? kNibbleScale : 1.0f;
  for (int i = thread; i < Config::kStageTiles * 4 * kUnits; i += threads) {
    const int key = stage * Config::kStageKeys + i / (4 * kUnits) * Config::kTileKeys +
                    i % kUnits * Config::kUnitKeys;
    const int at = k.scale_rows == ScaleRows::kKeyQuads ? key / 32 * 4 + i / kUnits % 4
                                                        : key >> (__ffs(k.block_rows) - 1);
    to[i] = at < sequence.num_k_scales ? from[at] * factor : 0.0f;
  }
}

// The place in the ring of the `n`th stage that a CTA walks over, and the parity of its phase.
template <class Config>
__device__ __forceinline__ int slot_of(int n) {
  return n % Config::kStages;
}
template <class Config>
__device__ __forceinline__ uint32_t phase_of(int n) {
  return n / Config::kStages % 2;
}

// One thread: 8-bit keys of the stages, as they are.
template <class Config>
__device__ void copy_keys(const EstimateArguments& a, typename Config::SharedStorage& smem,
                          int kv_head, int batch) {
  const int first_key = static_cast<int>(smem.sequence.first_key);
  for (int stage = smem.walk.begin; stage < smem.walk.end; ++stage) {
    const int slot = slot_of<Config>(stage - smem.walk.begin);
    smem.empty[slot].wait_idle(phase_of<Config>(stage - smem.walk.begin) ^ 1);
    smem.full[slot].arrive_expect(Config::kStageBytes);
    int8_t* to = smem.keys + slot * Config::kStageBytes;
    const int first = first_key + stage * Config::kStageKeys;
    for (int key = first; key < first + Config::kStageKeys; key += Config::kTileKeys) {
      for (int slice = 0; slice < Config::kSlices; ++slice) {
        copy_box_5d(to, &a.keys, smem.full[slot], 0, key, slice, kv_head,
                    a.problem.is_packed() ? 0 : batch);
        to += Config::kTileKeys * Config::kSliceBytes;
      }
    }
  }
}

// A warp: the scales of these stages.
template <class Config>
__device__ void copy_scales(const EstimateArguments& a, typename Config::SharedStorage& smem,
                            int kv_head) {
  for (int stage = smem.walk.begin; stage < smem.walk.end; ++stage) {
    const int slot = slot_of<Config>(stage - smem.walk.begin);
    smem.empty[slot].wait_idle(phase_of<Config>(stage - smem.walk.begin) ^ 1);
    load_scales<Config>(a.problem.k, smem.sequence, kv_head, stage,
                        static_cast<int>(threadIdx.x) % kWarpThreads, kWarpThreads,
                        &smem.scales[slot][0][0][0]);
    smem.full[slot].arrive();
  }
}

// A warpgroup: 4-bit keys of the stages, as bytes. Keys behind the end become zeros; no row sees them.
template <class Config>
__device__ void widen_keys(const EstimateArguments& a, typename Config::SharedStorage& smem,
                           int kv_head) {
  const CodedRows& k = a.problem.k;
  const char* codes = smem.sequence.k_codes + kv_head * k.codes.stride_head;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  auto keys = make_tensor(make_smem_ptr(smem.keys), typename Config::LayoutKeys{});
  for (int stage = smem.walk.begin; stage < smem.walk.end; ++stage) {
    const int slot = slot_of<Config>(stage - smem.walk.begin);
    smem.empty[slot].wait_idle(phase_of<Config>(stage - smem.walk.begin) ^ 1);
#pragma unroll 1
    for (int own = thread; own < Config::kStageKeys; own += 128) {  // a key a thread
      const int key = stage * Config::kStageKeys + own;
      uint4 c[Config::kSteps] = {};
      if (key < smem.sequence.num_keys) {
        const char* from = codes + key * k.codes.stride_row;
#pragma unroll
        for (int step = 0; step < Config::kSteps; ++step)
          c[step] = *reinterpret_cast<const uint4*>(from + step * 16);
      }
      const int row = own % Config::kTileKeys;
      const int to = slot * Config::kStageTiles + own / Config::kTileKeys;
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        const uint4& x = c[step];
        *reinterpret_cast<uint4*>(&keys(row, step * 32, to)) = {
            sm80::upper_codes(x.x), sm80::upper_codes(x.y), sm80::upper_codes(x.z),
            sm80::upper_codes(x.w)};
        *reinterpret_cast<uint4*>(&keys(row, step * 32 + 16, to)) = {
            sm80::lower_codes(x.x), sm80::lower_codes(x.y), sm80::lower_codes(x.z),
            sm80::lower_codes(x.w)};
      }
    }
    load_scales<Config>(k, smem.sequence, kv_head, stage, thread, 128, &smem.scales[slot][0][0][0]);
    fence_shared_for_async();
    smem.full[slot].arrive();
  }
}

}  // namespace attnsieve::sm90
