// Host side of one (element, stored element, head_dim).
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm80/threshold_decode/kernel.cuh"

namespace attnsieve::sm80 {

template <class Types, int kHeadDim, int kColumnTiles>
struct ThresholdDecodeKernel {
  using Storage = ThresholdStorage<DecodeConfig<Types, kHeadDim, kColumnTiles>>;
  static_assert(sizeof(Storage) <= 99 * 1024);  // of compute capability 8.6 and 8.9
  static constexpr auto kKernel = &threshold_decode_kernel<Types, kHeadDim, kColumnTiles>;

  static void run(const DecodeArguments& arguments, void* stream) {
    const int64_t ctas = int64_t{arguments.plan.items} * arguments.plan.max_chunks;
    launch<kKernel>("threshold_decode", ctas, kDecodeThreads, sizeof(Storage), stream, arguments);
  }
  static KernelEntry entry(const char* name) {
    return {name, reinterpret_cast<const void*>(kKernel), kDecodeThreads, sizeof(Storage)};
  }
};

template <class Element, class Stored, int kHeadDim>
void launch_threshold_decode(const DecodeArguments& arguments, void* stream) {
  using Types = DecodeTypes<Element, Stored>;
  if (arguments.plan.columns <= kTileColumns) {
    ThresholdDecodeKernel<Types, kHeadDim, 1>::run(arguments, stream);
  } else {
    ThresholdDecodeKernel<Types, kHeadDim, 2>::run(arguments, stream);
  }
}

template <class Element, class Stored, int kHeadDim>
std::vector<KernelEntry> threshold_decode_entries() {
  using Types = DecodeTypes<Element, Stored>;
  return {ThresholdDecodeKernel<Types, kHeadDim, 1>::entry("8 columns"),
          ThresholdDecodeKernel<Types, kHeadDim, 2>::entry("16 columns")};
}

}  // namespace attnsieve::sm80
