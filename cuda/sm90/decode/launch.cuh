// Host side of one (element, head_dim), with caches of elements and of codes.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm90/decode/cluster.cuh"

namespace attnsieve::sm90 {

template <class Types, int kHeadDim, int kColumnTiles>
struct DecodeListKernel {
  using Storage = ClusterDecodeStorage<sm80::DecodeConfig<Types, kHeadDim, kColumnTiles>>;

  static void run(const DecodeArguments& arguments, void* stream) {
    launch_clusters<decode_list_kernel<Types, kHeadDim, kColumnTiles>>(
        "decode", arguments.plan.items, arguments.plan.ranks, sm80::kDecodeThreads, sizeof(Storage),
        stream, arguments);
  }

  static KernelEntry entry(const char* name) {
    return {name, reinterpret_cast<const void*>(decode_list_kernel<Types, kHeadDim, kColumnTiles>),
            sm80::kDecodeThreads, sizeof(Storage)};
  }
};

template <class Element, class Stored, int kHeadDim>
void launch_decode_lists(const DecodeArguments& arguments, void* stream) {
  using Types = sm80::DecodeTypes<Element, Stored>;
  if (arguments.plan.columns <= sm80::kTileColumns) {
    DecodeListKernel<Types, kHeadDim, 1>::run(arguments, stream);
  } else {
    DecodeListKernel<Types, kHeadDim, 2>::run(arguments, stream);
  }
}

template <class Element, class Stored, int kHeadDim>
std::vector<KernelEntry> decode_lists_entries() {
  using Types = sm80::DecodeTypes<Element, Stored>;
  return {DecodeListKernel<Types, kHeadDim, 1>::entry("8 columns"),
          DecodeListKernel<Types, kHeadDim, 2>::entry("16 columns")};
}

}  // namespace attnsieve::sm90
