// Host side of one (element, head_dim): picks the kernel of the plan and launches it.
#pragma once

#include <algorithm>
#include <string>

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm90/attend/kernel.cuh"

namespace attnsieve::sm90 {

// 128 rows: two warpgroups that share every tile. Of 128 keys, but of 64 where O alone takes half of
// the registers.
template <class Element, int kHeadDim, bool kInterleaved>
using PairConfig = AttendConfig<Element, kHeadDim, 2, kHeadDim <= 128 ? 128 : 64,
                                kHeadDim <= 128 ? 128 : 64, kHeadDim == 64 ? 3 : 2,
                                kHeadDim == 64 ? 3 : 2, kHeadDim <= 128 ? 2 : 1, 1, kInterleaved>;
// Keys go ahead of values where most of these are skipped.
template <class Element, int kHeadDim, bool kInterleaved>
using VotedPairConfig = AttendConfig<Element, kHeadDim, 2, 128, 128, 3, 2, 2, 1, kInterleaved,
                                     /*kSelfFed=*/false, /*kVoted=*/true>;
// 64 rows x 64 keys, two CTAs an SM where they fit.
template <class Element, int kHeadDim, bool kInterleaved, bool kVoted>
using SingleConfig =
    AttendConfig<Element, kHeadDim, 1, 64, 64, kHeadDim <= 128 ? 3 : 2,
                 kHeadDim <= 128 && !kVoted ? 3 : 2, 1, kHeadDim <= 128 ? 2 : 1, kInterleaved,
                 /*kSelfFed=*/false, kVoted>;
// 64 rows x 64 keys of lists by a warpgroup that feeds itself, as many an SM as registers allow:
// each waits for its copies longer than it computes.
template <class Element, int kHeadDim, bool kInterleaved>
using SoloConfig = AttendConfig<Element, kHeadDim, 1, 64, 64, 1, 2, 1, kHeadDim == 64 ? 4 : 3,
                                kInterleaved, /*kSelfFed=*/true>;
// 64 rows that vote on 128 keys but advance the softmax by 64, as SingleConfig does.
template <class Element, int kHeadDim, bool kInterleaved>
using VotedPairOfSteps = AttendConfig<Element, kHeadDim, 1, 128, 64, 2, 1, 1, 2, kInterleaved,
                                      /*kSelfFed=*/false, /*kVoted=*/true>;

template <class Config_, bool kList>
struct KernelOf {
  using Config = Config_;
  using BlockIterator = std::conditional_t<kList, ListTiles<Config>, DenseTiles<Config>>;
  static constexpr auto kKernel = [] {
    if constexpr (Config::kSelfFed)
      return &attend_self_fed_kernel<Config, BlockIterator>;
    else
      return &attend_kernel<Config, BlockIterator>;
  }();
};

// Calls visit(KernelOf<...>) for every compiled kernel.
template <class Element, int kHeadDim, bool kInterleaved, bool kList, class Visit>
void visit_kernels(const Visit& visit) {
  constexpr bool kWideVotes = kHeadDim <= kMaxHeadDimOfWideVotes;
  visit(KernelOf<PairConfig<Element, kHeadDim, kInterleaved>, kList>{});
  if constexpr (kWideVotes) {
    visit(KernelOf<VotedPairConfig<Element, kHeadDim, kInterleaved>, kList>{});
  }
  visit(KernelOf<SingleConfig<Element, kHeadDim, kInterleaved, true>, kList>{});
  if constexpr (kList) {
    // Where a self-fed warpgroup's tiles fit three times: wider outputs have too few registers.
    using Solo = std::conditional_t<kHeadDim <= 128, SoloConfig<Element, kHeadDim, kInterleaved>,
                                    SingleConfig<Element, kHeadDim, kInterleaved, false>>;
    visit(KernelOf<Solo, kList>{});
    if constexpr (kWideVotes) {
      visit(KernelOf<VotedPairOfSteps<Element, kHeadDim, kInterleaved>, kList>{});
    }
  }
}

template <class Element, int kHeadDim, bool kInterleaved, bool kList>
void launch_attend(const AttendArguments& arguments, const AttendPlan& plan, int num_sms,
                   void* stream) {
  bool launched = false;
  visit_kernels<Element, kHeadDim, kInterleaved, kList>([&](auto kernel) {
    using Kernel = decltype(kernel);
    using Config = typename Kernel::Config;
    if (plan.warpgroups != Config::kWarpgroups || plan.tile_n != Config::kTileN ||
        plan.voted != Config::kVoted) {
      return;
    }
    int64_t ctas = arguments.num_items;
    if (plan.persistent) ctas = std::min<int64_t>(ctas, num_sms * Config::kCtasPerSm);
    launch<Kernel::kKernel>("attend (sm_90)", ctas, Config::kThreads,
                            sizeof(typename Config::SharedStorage), stream, arguments);
    launched = true;
  });
  if (!launched) {
    throw Unsupported("attend (sm_90): no kernel was compiled for " + plan.to_string());
  }
}

// Named by query rows x keys of a tile.
template <class Element, int kHeadDim, bool kInterleaved, bool kList>
std::vector<KernelEntry> attend_entries() {
  std::vector<KernelEntry> entries;
  visit_kernels<Element, kHeadDim, kInterleaved, kList>([&](auto kernel) {
    using Kernel = decltype(kernel);
    using Config = typename Kernel::Config;
    entries.push_back({std::to_string(Config::kWarpgroups * kWarpgroupRows) + "x" +
                           std::to_string(Config::kTileN) + (Config::kVoted ? " threshold" : ""),
                       reinterpret_cast<const void*>(Kernel::kKernel), Config::kThreads,
                       sizeof(typename Config::SharedStorage)});
  });
  return entries;
}

}  // namespace attnsieve::sm90
