#include "cuda/sm80/proxy_scores/launch.cuh"

namespace attnsieve::sm80 {
template void launch_proxy_scores<float>(const ProxyScoresArguments&, void*);
template std::vector<KernelEntry> proxy_scores_entries<float>();
}  // namespace attnsieve::sm80
