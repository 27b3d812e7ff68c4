#include "cuda/common/launch.cuh"
#include "cuda/dispatch/instantiations.h"
#include "cuda/sm90/select_tokens/cluster.cuh"

namespace attnsieve::sm90 {
namespace {

constexpr int kThreads = 1024;
constexpr size_t kMostSharedBytes = sm80::sampled_bytes(sm80::kMaxSampledColumnsOfCluster);

template <int kRanks>
void launch_ranks(const TokenSelectProblem& problem, bool sampled, int64_t lists, void* stream) {
  const size_t bytes = sampled ? sm80::sampled_bytes(problem.columns)
                               : sizeof(typename ClusterSelector<kThreads, kRanks>::SharedStorage);
  launch<select_tokens_kernel<kThreads, kRanks>, sm80::SelectTokensArguments, kMostSharedBytes>(
      "select_tokens", lists * kRanks, kThreads, bytes, stream,
      sm80::make_arguments(problem, sampled));
}

template <int kRanks>
KernelEntry entry() {
  return {std::to_string(kRanks) + " CTAs a list",
          reinterpret_cast<const void*>(&select_tokens_kernel<kThreads, kRanks>), kThreads,
          sm80::sampled_bytes(sm80::kMaxSampledColumns)};
}

}  // namespace

void launch_select_tokens(const TokenSelectProblem& problem, const sm80::SelectTokensPlan& plan,
                          void* stream) {
  const int64_t lists = problem.batch * problem.seqlen_q * problem.num_lists;
  switch (plan.ranks) {
    case 2: return launch_ranks<2>(problem, plan.sampled, lists, stream);
    case 4: return launch_ranks<4>(problem, plan.sampled, lists, stream);
    default: return launch_ranks<8>(problem, plan.sampled, lists, stream);
  }
}

std::vector<KernelEntry> select_tokens_entries() { return {entry<2>(), entry<4>(), entry<8>()}; }

}  // namespace attnsieve::sm90
