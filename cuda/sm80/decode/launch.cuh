// Host side of one (element, stored element, head_dim).
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm80/decode/kernel.cuh"

namespace attnsieve::sm80 {

// A multiple of 32 where that is nearly all that run at once: then equal items of 32 chunks, or twice
// or half as many, are cut where groups of chunks end.
inline int decode_ctas(int num_sms) {
  const int ctas = num_sms * kDecodeCtasPerSm;
  const int even = ctas / 32 * 32;
  return even * 16 >= ctas * 15 ? even : ctas;
}

template <class Types, int kHeadDim, int kColumnTiles>
void launch_decode_kernel(const DecodeArguments& arguments, int num_sms, void* stream) {
  using Config = DecodeConfig<Types, kHeadDim, kColumnTiles>;
  using Storage = DecodeStorage<Config>;
  static_assert(sizeof(Storage) <= 99 * 1024);  // of compute capability 8.6 and 8.9
  const int64_t chunks = int64_t{arguments.plan.items} * arguments.plan.max_chunks;
  const int64_t ctas = std::min<int64_t>(chunks, decode_ctas(num_sms));
  launch<decode_kernel<Types, kHeadDim, kColumnTiles>>("decode", ctas, kDecodeThreads,
                                                       sizeof(Storage), stream, arguments);
}

template <class Element, class Stored, int kHeadDim>
void launch_decode(const DecodeArguments& arguments, int num_sms, void* stream) {
  using Types = DecodeTypes<Element, Stored>;
  if (arguments.plan.columns <= kTileColumns) {
    launch_decode_kernel<Types, kHeadDim, 1>(arguments, num_sms, stream);
  } else {
    launch_decode_kernel<Types, kHeadDim, 2>(arguments, num_sms, stream);
  }
}

template <class Element, class Stored, int kHeadDim>
std::vector<KernelEntry> decode_entries() {
  using Types = DecodeTypes<Element, Stored>;
  return {{"8 columns", reinterpret_cast<const void*>(decode_kernel<Types, kHeadDim, 1>),
           kDecodeThreads, sizeof(DecodeStorage<DecodeConfig<Types, kHeadDim, 1>>)},
          {"16 columns", reinterpret_cast<const void*>(decode_kernel<Types, kHeadDim, 2>),
           kDecodeThreads, sizeof(DecodeStorage<DecodeConfig<Types, kHeadDim, 2>>)}};
}

}  // namespace attnsieve::sm80
