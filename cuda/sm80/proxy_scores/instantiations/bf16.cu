#include "cuda/sm80/proxy_scores/launch.cuh"

namespace attnsieve::sm80 {
template void launch_proxy_scores<__nv_bfloat16>(const ProxyScoresArguments&, void*);
template std::vector<KernelEntry> proxy_scores_entries<__nv_bfloat16>();
}  // namespace attnsieve::sm80
