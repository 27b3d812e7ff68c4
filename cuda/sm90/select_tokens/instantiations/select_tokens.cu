#include "cuda/common/launch.cuh"
#include "cuda/dispatch/instantiations.h"
#include "cuda/sm90/select_tokens/cluster.cuh"

namespace attnsieve::sm90 {
namespace {

constexpr int kThreads = 1024;

template <int kRanks>
void launch_ranks(const TokenSelectProblem& problem, int64_t lists, void* stream) {
  launch<select_tokens_kernel<kThreads, kRanks>>("select_tokens", lists * kRanks, kThreads, 0,
                                                 stream, problem);
}

template <int kRanks>
KernelEntry entry() {
  return {std::to_string(kRanks) + " CTAs a list",
          reinterpret_cast<const void*>(&select_tokens_kernel<kThreads, kRanks>), kThreads, 0};
}

}  // namespace

void launch_select_tokens(const TokenSelectProblem& problem, int ranks, void* stream) {
  const int64_t lists = problem.batch * problem.seqlen_q * problem.num_lists;
  switch (ranks) {
    case 2: return launch_ranks<2>(problem, lists, stream);
    case 4: return launch_ranks<4>(problem, lists, stream);
    default: return launch_ranks<8>(problem, lists, stream);
  }
}

std::vector<KernelEntry> select_tokens_entries() { return {entry<2>(), entry<4>(), entry<8>()}; }

}  // namespace attnsieve::sm90
