#include "cuda/sm90/decode/launch.cuh"

namespace attnsieve::sm90 {
template void launch_decode_lists<cute::bfloat16_t, cute::bfloat16_t, 128>(const DecodeArguments&,
                                                                           void*);
template std::vector<KernelEntry> decode_lists_entries<cute::bfloat16_t, cute::bfloat16_t, 128>();
template void launch_decode_lists<cute::bfloat16_t, cute::float_e4m3_t, 128>(const DecodeArguments&,
                                                                             void*);
template std::vector<KernelEntry> decode_lists_entries<cute::bfloat16_t, cute::float_e4m3_t, 128>();
}  // namespace attnsieve::sm90
