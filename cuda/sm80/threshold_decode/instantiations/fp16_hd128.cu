#include "cuda/sm80/threshold_decode/launch.cuh"

namespace attnsieve::sm80 {
template void launch_threshold_decode<cute::half_t, cute::half_t, 128>(const DecodeArguments&,
                                                                       void*);
template std::vector<KernelEntry> threshold_decode_entries<cute::half_t, cute::half_t, 128>();
}  // namespace attnsieve::sm80
