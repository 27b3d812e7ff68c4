#include "cuda/sm90/estimate/launch.cuh"

namespace attnsieve::sm90 {

template void launch_estimate_block_scores<96>(const EstimateProblem&, void*);
template std::vector<KernelEntry> estimate_block_scores_entries<96>();

}  // namespace attnsieve::sm90
