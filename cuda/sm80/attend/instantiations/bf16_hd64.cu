#include "cuda/sm80/attend/launch.cuh"

namespace attnsieve::sm80 {
template void launch_attend<cute::bfloat16_t, 64>(const AttendProblem&, void*);
template std::vector<KernelEntry> attend_entries<cute::bfloat16_t, 64>();
}  // namespace attnsieve::sm80
