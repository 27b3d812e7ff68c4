#include "cuda/sm80/estimate/launch.cuh"

namespace attnsieve::sm80 {

template void launch_estimate_block_scores<128>(const EstimateProblem&, void*);
template std::vector<KernelEntry> estimate_block_scores_entries<128>();

}  // namespace attnsieve::sm80
