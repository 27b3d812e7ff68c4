#include "cuda/sm80/proxy_scores/launch.cuh"

namespace attnsieve::sm80 {
template void launch_proxy_scores<__half>(const ProxyScoresArguments&, void*);
template std::vector<KernelEntry> proxy_scores_entries<__half>();
}  // namespace attnsieve::sm80
