#include "cuda/dispatch/heuristics.h"

#include <algorithm>
#include <cstring>

namespace attnsieve::cuda {

DeviceInfo device_of_family(DeviceInfo device, const char* forced) {
  if (forced == nullptr || forced[0] == '\0') return device;
  const bool sm90 = std::strcmp(forced, backend_name(Backend::kSm90)) == 0;
  if (!sm90 && std::strcmp(forced, backend_name(Backend::kSm80)) != 0) {
    throw InvalidArgument(std::string("ATTNSIEVE_BACKEND: expected sm_80 or sm_90, got ") + forced);
  }
  if (sm90 && device.compute_capability != 90) {
    throw Unsupported(
        "the sm_90 kernels need a GPU of compute capability 9.0 and a build with them");
  }
  if (!sm90) device.compute_capability = std::min(device.compute_capability, 89);
  return device;
}

Backend choose_attend_backend(const AttendProblem& problem, const DeviceInfo& device) {
  if (device.compute_capability < 80) {
    throw Unsupported("attend needs a GPU of compute capability 8.0 or newer, got " +
                      std::to_string(device.compute_capability / 10) + "." +
                      std::to_string(device.compute_capability % 10));
  }
  const Backend best = device.compute_capability == 90 ? Backend::kSm90 : Backend::kSm80;
  require_supported("attend", best, problem.dtype, problem.head_dim);
  return best;
}

int select_threads(int64_t num_k_blocks) {
  if (num_k_blocks <= 64) return 64;
  return num_k_blocks <= 128 ? 128 : 256;
}

}  // namespace attnsieve::cuda

namespace attnsieve::sm80 {

SelectTokensPlan plan_select_tokens(const TokenSelectProblem& problem,
                                    const cuda::DeviceInfo& device) {
  // Room in the list of keys for more than are kept.
  constexpr int64_t kMaxSampledCapacity = 6144;
  const int64_t lists = problem.batch * problem.seqlen_q * problem.num_lists;
  const int64_t columns = problem.columns;
  const int num_sms = device.num_sms;
  const bool fits =
      problem.rule == TokenRule::kThreshold || problem.capacity <= kMaxSampledCapacity;
  SelectTokensPlan plan;
  // Clusters share long lists while two thirds of the SMs hold them all: measured on H200.
  constexpr int64_t kMinClusterColumns = 32 * 1024;
  constexpr int64_t kMinRankColumns = 6 * 1024;
  if (device.compute_capability == 90 && columns > kMinClusterColumns) {
    while (plan.ranks < 8 && lists * plan.ranks * 3 <= num_sms &&
           columns >= plan.ranks * 2 * kMinRankColumns) {
      plan.ranks *= 2;
    }
  }
  plan.sampled =
      fits && columns <= (plan.ranks > 1 ? kMaxSampledColumnsOfCluster : kMaxSampledColumns);
  // Without clusters CTAs share lists that are not sampled, in five launches, where one a list would
  // leave half of the GPU idle.
  constexpr int64_t kMinPartColumns = 4096;
  constexpr int64_t kCtasPerSm = 2;
  if (plan.ranks == 1 && !plan.sampled && lists > 0 && 2 * lists <= num_sms &&
      columns > kMaxSplitCandidates) {
    const int64_t least = (columns + kMaxSplitCandidates - 1) / kMaxSplitCandidates;
    const int64_t useful = std::min(kCtasPerSm * num_sms / lists, columns / kMinPartColumns);
    plan.parts = static_cast<int>(std::max(least, useful));
  }
  // Two CTAs share an SM where lists queue for it, and short lists leave half of 1024 threads idle.
  constexpr int64_t kShortList = 16 * 1024;
  plan.threads = plan.ranks == 1 && (lists > num_sms || columns <= kShortList) ? 512 : 1024;
  return plan;
}

}  // namespace attnsieve::sm80

namespace attnsieve::sm90 {
namespace {

// The largest of the box heights that divides what lies together in memory.
int piece_keys_of(const AttendProblem& problem, int tile_n) {
  int piece = problem.is_indexed() ? problem.index.unit_keys() : tile_n;
  while (problem.is_paged() && problem.paged.page_size % piece != 0) piece /= 2;
  return std::min(piece, tile_n);
}

}  // namespace

AttendPlan plan_attend(const AttendProblem& problem) {
  AttendPlan plan;
  const bool indexed = problem.is_indexed();
  // Tiles of 64 keys are voted on by warpgroups that do not share them: their last tiles differ.
  const bool narrow = problem.threshold.skip_block == kUnitKeys;
  plan.voted = problem.threshold.enabled || narrow;
  const bool wide_o = problem.head_dim > kMaxHeadDimOfWideVotes;
  if (wide_o && plan.voted && !narrow) {
    throw Unsupported("attend (sm_90): threshold with skip_block " +
                      std::to_string(problem.threshold.skip_block) +
                      " is not available for head_dim " + std::to_string(problem.head_dim) +
                      "; use skip_block " + std::to_string(kUnitKeys));
  }
  const bool half_rows = indexed && problem.index.block_q == kGroupRows;
  plan.pack_heads =
      half_rows && !narrow && problem.index.heads_per_list > 1 && problem.group_size() > 1;
  plan.warpgroups = narrow || (half_rows && !plan.pack_heads) ? 1 : 2;
  plan.tile_n = narrow || wide_o || (plan.warpgroups == 1 && !plan.voted) ? 64 : 128;
  // Several CTAs an SM then take the place of producer warps. A wider output leaves too few
  // registers for them.
  plan.self_fed = indexed && plan.warpgroups == 1 && !plan.voted && !wide_o;
  plan.piece_keys = piece_keys_of(problem, plan.tile_n);
  plan.interleaved = plan.piece_keys < 64 && problem.head_dim > 64;
  // Resident CTAs load the next item's tiles under this one's epilogue; where several share an SM,
  // the others' work already fills that gap. Items of different lengths are handed out one by one;
  // where there is no counter for that, the hardware's order of CTAs balances causal dense problems
  // better than a fixed share each.
  const bool right_bound = problem.mask.causal || problem.mask.window_right >= 0;
  plan.dynamic = plan.warpgroups == 2 && (indexed || right_bound) && problem.workspace != nullptr;
  plan.persistent = plan.warpgroups == 2 && (indexed || !right_bound || plan.dynamic);
  return plan;
}

std::string AttendPlan::to_string() const {
  return "rows " + std::to_string(warpgroups) + "x64" + (pack_heads ? " (heads packed)" : "") +
         ", keys " + std::to_string(tile_n) + " in pieces of " + std::to_string(piece_keys) +
         (interleaved ? " (interleaved)" : "") + (voted ? ", voted" : "") +
         (self_fed ? ", self-fed" : "") + (persistent ? ", persistent" : "") +
         (dynamic ? ", dynamic" : "");
}

}  // namespace attnsieve::sm90
