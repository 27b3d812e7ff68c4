// Host side of one (element, head_dim): picks the kernel of the plan and launches it.
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm90/attend/kernel.cuh"

namespace attnsieve::sm90 {

// 128 rows x 128 keys: two warpgroups that share every tile.
template <class Element, int kHeadDim, bool kInterleaved>
using PairConfig = AttendConfig<Element, kHeadDim, 2, 128, 128, kHeadDim == 64 ? 3 : 2,
                                kHeadDim == 64 ? 3 : 2, 2, 1, kInterleaved>;
// 64 rows x 64 keys, two CTAs an SM: bound by L2, so depth of loads is what counts.
template <class Element, int kHeadDim, bool kInterleaved>
using SingleConfig = AttendConfig<Element, kHeadDim, 1, 64, 64, 3, 3, 1, 2, kInterleaved>;
// 64 rows that vote on 128 keys but advance the softmax by 64, as SingleConfig does.
template <class Element, int kHeadDim, bool kInterleaved>
using VotedPairOfSteps = AttendConfig<Element, kHeadDim, 1, 128, 64, 2, 1, 1, 2, kInterleaved>;

template <class Config, class BlockIterator, class SkipPolicy>
void launch_attend_kernel(const AttendArguments& arguments, const AttendPlan& plan, int num_sms,
                          void* stream) {
  int64_t ctas = arguments.num_items;
  if (plan.persistent) ctas = std::min<int64_t>(ctas, num_sms * Config::kCtasPerSm);
  launch<attend_kernel<Config, BlockIterator, SkipPolicy>>("attend (sm_90)", ctas, Config::kThreads,
                                                           sizeof(typename Config::SharedStorage),
                                                           stream, arguments);
}

template <bool kList, class Config>
using Iterator = std::conditional_t<kList, ListTiles<Config>, DenseTiles<Config>>;

template <class Element, int kHeadDim, bool kInterleaved, bool kList>
void launch_attend(const AttendArguments& arguments, const AttendPlan& plan, int num_sms,
                   void* stream) {
  using Pair = PairConfig<Element, kHeadDim, kInterleaved>;
  using Single = SingleConfig<Element, kHeadDim, kInterleaved>;
  using Steps = VotedPairOfSteps<Element, kHeadDim, kInterleaved>;
  const bool pair = plan.warpgroups == Pair::kWarpgroups && plan.tile_n == Pair::kTileN;
  const bool single = plan.warpgroups == Single::kWarpgroups && plan.tile_n == Single::kTileN;
  if (pair && plan.voted) {
    return launch_attend_kernel<Pair, Iterator<kList, Pair>, ThresholdSkip>(arguments, plan,
                                                                            num_sms, stream);
  }
  if (pair) {
    return launch_attend_kernel<Pair, Iterator<kList, Pair>, NoSkip>(arguments, plan, num_sms,
                                                                     stream);
  }
  if (single && plan.voted) {
    return launch_attend_kernel<Single, Iterator<kList, Single>, ThresholdSkip>(arguments, plan,
                                                                                num_sms, stream);
  }
  if constexpr (kList) {
    if (single) {
      return launch_attend_kernel<Single, ListTiles<Single>, NoSkip>(arguments, plan, num_sms,
                                                                     stream);
    }
    if (plan.warpgroups == Steps::kWarpgroups && plan.tile_n == Steps::kTileN && plan.voted) {
      return launch_attend_kernel<Steps, ListTiles<Steps>, ThresholdSkip>(arguments, plan, num_sms,
                                                                          stream);
    }
  }
  throw Unsupported("attend (sm_90): no kernel was compiled for " + plan.to_string());
}

template <class Config, class BlockIterator, class SkipPolicy>
KernelEntry attend_entry(const char* name) {
  return {name, reinterpret_cast<const void*>(attend_kernel<Config, BlockIterator, SkipPolicy>),
          Config::kThreads, sizeof(typename Config::SharedStorage)};
}

template <class Element, int kHeadDim, bool kInterleaved, bool kList>
std::vector<KernelEntry> attend_entries() {
  using Pair = PairConfig<Element, kHeadDim, kInterleaved>;
  using Single = SingleConfig<Element, kHeadDim, kInterleaved>;
  using Steps = VotedPairOfSteps<Element, kHeadDim, kInterleaved>;
  std::vector<KernelEntry> entries;
  entries.push_back(attend_entry<Pair, Iterator<kList, Pair>, NoSkip>("128x128"));
  entries.push_back(attend_entry<Pair, Iterator<kList, Pair>, ThresholdSkip>("128x128 threshold"));
  entries.push_back(
      attend_entry<Single, Iterator<kList, Single>, ThresholdSkip>("64x64 threshold"));
  if constexpr (kList) {
    entries.push_back(attend_entry<Single, ListTiles<Single>, NoSkip>("64x64"));
    entries.push_back(attend_entry<Steps, ListTiles<Steps>, ThresholdSkip>("64x128 threshold"));
  }
  return entries;
}

}  // namespace attnsieve::sm90
