#include "cuda/sm80/attend/launch.cuh"

namespace attnsieve::sm80 {
template void launch_attend<cute::half_t, 128>(const AttendProblem&, void*);
template std::vector<KernelEntry> attend_entries<cute::half_t, 128>();
}  // namespace attnsieve::sm80
