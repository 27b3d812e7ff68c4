// Host side of one (element, head_dim).
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm80/decode/kernel.cuh"

namespace attnsieve::sm80 {

template <class Element, int kHeadDim, int kColumnTiles>
void launch_decode_kernel(const DecodeArguments& arguments, int num_sms, void* stream) {
  using Storage = DecodeStorage<Element, kHeadDim, kColumnTiles>;
  const int64_t most = static_cast<int64_t>(arguments.plan.items) * arguments.plan.max_chunks;
  const int64_t ctas = std::min<int64_t>(most, num_sms * cuda::kDecodeCtasPerSm);
  launch<decode_kernel<Element, kHeadDim, kColumnTiles>>("decode", ctas, kDecodeThreads,
                                                         sizeof(Storage), stream, arguments);
}

template <class Element, int kHeadDim>
void launch_decode(const DecodeArguments& arguments, int num_sms, void* stream) {
  if (arguments.plan.columns <= kTileColumns) {
    launch_decode_kernel<Element, kHeadDim, 1>(arguments, num_sms, stream);
  } else {
    launch_decode_kernel<Element, kHeadDim, 2>(arguments, num_sms, stream);
  }
}

template <class Element, int kHeadDim>
std::vector<KernelEntry> decode_entries() {
  return {{"8 columns", reinterpret_cast<const void*>(decode_kernel<Element, kHeadDim, 1>),
           kDecodeThreads, sizeof(DecodeStorage<Element, kHeadDim, 1>)},
          {"16 columns", reinterpret_cast<const void*>(decode_kernel<Element, kHeadDim, 2>),
           kDecodeThreads, sizeof(DecodeStorage<Element, kHeadDim, 2>)}};
}

}  // namespace attnsieve::sm80
