// Host side of one (element, head_dim): picks the kernel of the problem's iterator and skip policy
// and launches it.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm80/attend/kernel.cuh"

namespace attnsieve::sm80 {

// Two warps of 32 rows, one unit of K and V: least shared-memory traffic per MMA, four CTAs an SM.
template <class Element, int kHeadDim>
using PlainConfig = AttendConfig<Element, kHeadDim, 2, 1>;
// Both units of a voted tile keep their scores in registers, so a warp owns 16 rows.
template <class Element, int kHeadDim>
using VotedConfig = AttendConfig<Element, kHeadDim, 4, 2>;

template <class Config, class BlockIterator, class SkipPolicy>
void launch_attend_kernel(const AttendProblem& problem, void* stream) {
  launch(attend_kernel<Config, BlockIterator, SkipPolicy>, "attend (sm_80)",
         max_row_groups(problem) * problem.num_heads, Config::kThreads,
         sizeof(typename Config::SharedStorage), stream, problem);
}

template <class Element, int kHeadDim>
void launch_attend(const AttendProblem& problem, void* stream) {
  using Plain = PlainConfig<Element, kHeadDim>;
  using Voted = VotedConfig<Element, kHeadDim>;
  if (problem.threshold.enabled) {
    if (problem.is_indexed())
      return launch_attend_kernel<Voted, ListIterator, ThresholdSkip>(problem, stream);
    return launch_attend_kernel<Voted, DenseIterator, ThresholdSkip>(problem, stream);
  }
  if (problem.is_indexed())
    return launch_attend_kernel<Plain, ListIterator, NoSkip>(problem, stream);
  return launch_attend_kernel<Plain, DenseIterator, NoSkip>(problem, stream);
}

template <class Config, class BlockIterator, class SkipPolicy>
KernelEntry attend_entry(const char* name) {
  return {name, reinterpret_cast<const void*>(attend_kernel<Config, BlockIterator, SkipPolicy>),
          Config::kThreads, sizeof(typename Config::SharedStorage)};
}

template <class Element, int kHeadDim>
std::vector<KernelEntry> attend_entries() {
  using Plain = PlainConfig<Element, kHeadDim>;
  using Voted = VotedConfig<Element, kHeadDim>;
  return {attend_entry<Plain, DenseIterator, NoSkip>("dense"),
          attend_entry<Plain, ListIterator, NoSkip>("list"),
          attend_entry<Voted, DenseIterator, ThresholdSkip>("dense threshold"),
          attend_entry<Voted, ListIterator, ThresholdSkip>("list threshold")};
}

}  // namespace attnsieve::sm80
