#include "cuda/sm90/attend/launch.cuh"

namespace attnsieve::sm90 {
template void launch_attend<cute::half_t, 256, true, true>(const AttendArguments&,
                                                           const AttendPlan&, int, void*);
template std::vector<KernelEntry> attend_entries<cute::half_t, 256, true, true>();
}  // namespace attnsieve::sm90
