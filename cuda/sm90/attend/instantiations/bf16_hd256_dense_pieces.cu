#include "cuda/sm90/attend/launch.cuh"

namespace attnsieve::sm90 {
template void launch_attend<cute::bfloat16_t, 256, true, false>(const AttendArguments&,
                                                                const AttendPlan&, int, void*);
template std::vector<KernelEntry> attend_entries<cute::bfloat16_t, 256, true, false>();
}  // namespace attnsieve::sm90
