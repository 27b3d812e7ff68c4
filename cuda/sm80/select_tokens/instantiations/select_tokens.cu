#include "cuda/common/launch.cuh"
#include "cuda/dispatch/instantiations.h"
#include "cuda/sm80/select_tokens/kernel.cuh"
#include "cuda/sm80/select_tokens/split.cuh"

namespace attnsieve::sm80 {
namespace {

constexpr const char* kName = "select_tokens";

// Parts of the workspace, one behind the other; the first two are zeroed.
struct WorkspaceBytes {
  size_t states;
  size_t counts;
  size_t orders;

  WorkspaceBytes(int64_t lists, int parts)
      : states(lists * sizeof(SplitState)),
        counts(lists * parts * sizeof(uint32_t)),
        orders(lists * SplitList::Counter::kListCapacity * sizeof(uint32_t)) {}
};

template <int kThreads>
size_t radix_bytes() {
  return sizeof(typename TokenSelector<kThreads>::SharedStorage);
}

template <int kThreads>
void launch_whole(const TokenSelectProblem& problem, const SelectTokensPlan& plan, int64_t lists,
                  void* stream) {
  const size_t bytes = plan.sampled ? sampled_bytes(problem.columns) : radix_bytes<kThreads>();
  launch<select_tokens_kernel<kThreads>, SelectTokensArguments, sampled_bytes(kMaxSampledColumns)>(
      kName, lists, kThreads, bytes, stream, make_arguments(problem, plan.sampled));
}

void launch_split(const TokenSelectProblem& problem, int64_t lists, int parts, void* stream) {
  const WorkspaceBytes bytes(lists, parts);
  char* const workspace = static_cast<char*>(problem.workspace);
  check_cuda(
      cudaMemsetAsync(workspace, 0, bytes.states + bytes.counts, static_cast<cudaStream_t>(stream)),
      "select_tokens: zero the workspace");
  SplitArguments arguments;
  arguments.lists = make_arguments(problem, false);
  arguments.states = reinterpret_cast<SplitState*>(workspace);
  arguments.counts = reinterpret_cast<uint32_t*>(workspace + bytes.states);
  arguments.orders = reinterpret_cast<uint32_t*>(workspace + bytes.states + bytes.counts);
  arguments.parts = static_cast<uint32_t>(parts);
  for (arguments.digit = 0; arguments.digit < kScoreDigits; ++arguments.digit) {
    launch<select_tokens_digit_kernel>(kName, lists * parts, kSplitThreads, 0, stream, arguments);
  }
  launch<select_tokens_write_kernel>(kName, lists * parts, kSplitThreads, 0, stream, arguments);
}

}  // namespace

size_t select_tokens_workspace_bytes(int64_t lists, int parts) {
  if (parts == 1) return 0;
  const WorkspaceBytes bytes(lists, parts);
  return bytes.states + bytes.counts + bytes.orders;
}

void launch_select_tokens(const TokenSelectProblem& problem, const SelectTokensPlan& plan,
                          void* stream) {
  const int64_t lists = problem.batch * problem.seqlen_q * problem.num_lists;
  if (lists == 0) return;
  if (plan.parts > 1) return launch_split(problem, lists, plan.parts, stream);
  if (plan.threads == 512) return launch_whole<512>(problem, plan, lists, stream);
  launch_whole<1024>(problem, plan, lists, stream);
}

std::vector<KernelEntry> select_tokens_entries() {
  const auto entry = [](const char* name, auto* kernel, int threads, size_t shared_bytes = 0) {
    return KernelEntry{name, reinterpret_cast<const void*>(kernel), threads, shared_bytes};
  };
  const size_t most = sampled_bytes(kMaxSampledColumns);
  return {entry("512 threads a list", &select_tokens_kernel<512>, 512, most),
          entry("1024 threads a list", &select_tokens_kernel<1024>, 1024, most),
          entry("digit of a split list", &select_tokens_digit_kernel, kSplitThreads),
          entry("write a split list", &select_tokens_write_kernel, kSplitThreads)};
}

}  // namespace attnsieve::sm80
