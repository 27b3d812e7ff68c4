#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/sm80/fetch_tokens/kernel.cuh"

namespace attnsieve::sm80 {

void launch_fetch_tokens(const FetchArguments& arguments, int num_sms, void* stream) {
  const int64_t lines = arguments.problem.batch * arguments.problem.num_heads;
  if (lines == 0) return;
  launch<place_tokens_kernel>("fetch_tokens", lines, kPlaceThreads, 0, stream, arguments);
  // About two CTAs an SM: what is in flight hides the latency of a host link.
  const int64_t parts = std::max<int64_t>(1, 2 * num_sms / lines);
  launch<copy_tokens_kernel>("fetch_tokens", lines * parts, kCopyWarps * kWarpThreads, 0, stream,
                             arguments);
}

std::vector<KernelEntry> fetch_tokens_entries() {
  return {
      {"place", reinterpret_cast<const void*>(place_tokens_kernel), kPlaceThreads, 0},
      {"copy", reinterpret_cast<const void*>(copy_tokens_kernel), kCopyWarps * kWarpThreads, 0}};
}

}  // namespace attnsieve::sm80
