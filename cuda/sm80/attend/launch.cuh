// Host side of one (element, head_dim): picks the kernel of the problem's iterator and skip policy
// and launches it.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm80/attend/kernel.cuh"

namespace attnsieve::sm80 {

// Keys of one online-softmax step. Two units a step save barriers and rescaling where registers
// allow it; on lists the finer step wins (H200, 2026-11-22, hd64 32k density .1: 271 against 255
// TF).
template <int kHeadDim, class BlockIterator>
inline constexpr int kStepKeys =
    kHeadDim == 64 && std::is_same_v<BlockIterator, DenseIterator> ? 2 * kUnitKeys : kUnitKeys;

// Two warps of 32 rows: least shared-memory traffic per MMA, four CTAs an SM. What the walk over a
// list's pieces keeps in registers leaves room for 16 rows a warp at head_dim 128.
template <int kHeadDim, class BlockIterator>
inline constexpr int kPlainWarps =
    kHeadDim == 128 && std::is_same_v<BlockIterator, ListPieceIterator> ? 4 : 2;

template <class Element, int kHeadDim, class BlockIterator>
using PlainConfig = AttendConfig<
    Element, kHeadDim, kStepKeys<kHeadDim, BlockIterator>, kPlainWarps<kHeadDim, BlockIterator>, 1,
    kHeadDim == 64 && kStepKeys<kHeadDim, BlockIterator> == kUnitKeys, BlockIterator::kInPieces>;
// The scores of a whole voted tile stay in registers, so a warp owns 16 rows.
template <class Element, int kHeadDim, class BlockIterator>
using VotedConfig = AttendConfig<Element, kHeadDim, kStepKeys<kHeadDim, BlockIterator>, 4,
                                 2 * kUnitKeys / kStepKeys<kHeadDim, BlockIterator>, false,
                                 BlockIterator::kInPieces>;

template <class Config, class BlockIterator, class SkipPolicy>
void launch_attend_kernel(const AttendProblem& problem, void* stream) {
  launch<attend_kernel<Config, BlockIterator, SkipPolicy>>(
      "attend (sm_80)", max_row_groups(problem) * problem.num_heads, Config::kThreads,
      sizeof(typename Config::SharedStorage), stream, problem);
}

template <class Element, int kHeadDim, class BlockIterator>
void launch_attend_over(const AttendProblem& problem, void* stream) {
  if (problem.threshold.enabled) {
    launch_attend_kernel<VotedConfig<Element, kHeadDim, BlockIterator>, BlockIterator,
                         ThresholdSkip>(problem, stream);
  } else {
    launch_attend_kernel<PlainConfig<Element, kHeadDim, BlockIterator>, BlockIterator, NoSkip>(
        problem, stream);
  }
}

template <class Element, int kHeadDim>
void launch_attend(const AttendProblem& problem, void* stream) {
  if (problem.is_indexed()) {
    if (problem.is_paged() || problem.index.block_k < kUnitKeys) {
      launch_attend_over<Element, kHeadDim, ListPieceIterator>(problem, stream);
    } else {
      launch_attend_over<Element, kHeadDim, ListIterator>(problem, stream);
    }
  } else if (problem.is_paged()) {
    launch_attend_over<Element, kHeadDim, DensePieceIterator>(problem, stream);
  } else {
    launch_attend_over<Element, kHeadDim, DenseIterator>(problem, stream);
  }
}

template <class Config, class BlockIterator, class SkipPolicy>
KernelEntry attend_entry(const char* name) {
  return {name, reinterpret_cast<const void*>(attend_kernel<Config, BlockIterator, SkipPolicy>),
          Config::kThreads, sizeof(typename Config::SharedStorage)};
}

template <class Element, int kHeadDim, class BlockIterator>
void append_entries(std::vector<KernelEntry>* entries, const char* plain, const char* voted) {
  using Plain = PlainConfig<Element, kHeadDim, BlockIterator>;
  using Voted = VotedConfig<Element, kHeadDim, BlockIterator>;
  entries->push_back(attend_entry<Plain, BlockIterator, NoSkip>(plain));
  entries->push_back(attend_entry<Voted, BlockIterator, ThresholdSkip>(voted));
}

template <class Element, int kHeadDim>
std::vector<KernelEntry> attend_entries() {
  std::vector<KernelEntry> entries;
  append_entries<Element, kHeadDim, DenseIterator>(&entries, "dense", "dense threshold");
  append_entries<Element, kHeadDim, ListIterator>(&entries, "list", "list threshold");
  append_entries<Element, kHeadDim, DensePieceIterator>(&entries, "dense pieces",
                                                        "dense pieces threshold");
  append_entries<Element, kHeadDim, ListPieceIterator>(&entries, "list pieces",
                                                       "list pieces threshold");
  return entries;
}

}  // namespace attnsieve::sm80
