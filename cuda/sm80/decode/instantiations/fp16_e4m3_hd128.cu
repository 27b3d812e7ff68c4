#include "cuda/sm80/decode/launch.cuh"

namespace attnsieve::sm80 {
template void launch_decode<cute::half_t, cute::float_e4m3_t, 128>(const DecodeArguments&, int,
                                                                   void*);
template std::vector<KernelEntry> decode_entries<cute::half_t, cute::float_e4m3_t, 128>();
}  // namespace attnsieve::sm80
