#include "cuda/dispatch/plan_decode.h"

#include <algorithm>
#include <limits>

#include "attnsieve/status.h"

namespace attnsieve::cuda {

namespace {

// Items and what they share; chunks are the callers'.
DecodePlan plan_items(const DecodeProblem& problem) {
  constexpr int64_t kMaxCount = std::numeric_limits<int>::max() / kMaxDecodeSplits;
  DecodePlan plan;
  plan.rows = problem.index.per_row() ? 1 : static_cast<int>(problem.seqlen_q);
  plan.group_size = static_cast<int>(problem.num_heads / problem.num_kv_heads);
  plan.shared_heads = problem.index.given()
                          ? std::min(plan.group_size, problem.index.heads_per_list)
                          : plan.group_size;
  // Two MMA tiles of query vectors: more would not leave room for the output.
  plan.heads = std::min(plan.shared_heads, kMaxDecodeGroup / plan.rows);
  plan.columns = plan.heads * plan.rows;
  plan.items_per_group = (plan.shared_heads + plan.heads - 1) / plan.heads;
  const int64_t per_row = problem.num_heads / plan.shared_heads * plan.items_per_group;
  const int64_t per_batch = per_row * (problem.seqlen_q / plan.rows);
  if (problem.batch * per_batch > kMaxCount) {
    throw InvalidArgument("decode: the problem has " + std::to_string(problem.batch * per_batch) +
                          " work items, at most " + std::to_string(kMaxCount) + " are supported");
  }
  plan.items_per_row = static_cast<int>(per_row);
  plan.items_per_batch = static_cast<int>(per_batch);
  plan.items = static_cast<int>(problem.batch * per_batch);
  return plan;
}

// Slots are counted up to four tiles a warp beyond the last.
constexpr int64_t kMaxSlots = std::numeric_limits<int>::max() - 1024;

}  // namespace

DecodePlan plan_threshold_decode(const DecodeProblem& problem) {
  constexpr int kSplitsPerCta = 4;  // one a warp
  if (problem.seqlen_k > kMaxSlots) {
    throw InvalidArgument("threshold_decode: a cache of " + std::to_string(problem.seqlen_k) +
                          " keys, at most " + std::to_string(kMaxSlots) + " are supported");
  }
  DecodePlan plan = plan_items(problem);
  plan.max_chunks = (problem.num_splits + kSplitsPerCta - 1) / kSplitsPerCta;
  return plan;
}

DecodePlan plan_decode(const DecodeProblem& problem, const DeviceInfo& device) {
  constexpr int64_t kTileKeys = 16;
  constexpr int64_t kChunkUnit = 64;  // a tile for each of four warps
  constexpr int64_t kMinChunk = 2 * kChunkUnit;
  DecodePlan plan = plan_items(problem);
  int64_t slots = problem.seqlen_k;
  if (problem.index.given()) {
    slots = problem.index.capacity * problem.index.page_size;
    // A range that begins where only the device knows may be as long as the cache.
    slots += problem.dense_begin != nullptr ? problem.seqlen_k
                                            : std::min(problem.recent, problem.seqlen_k);
  }
  if (slots > kMaxSlots) {
    throw InvalidArgument("decode: a list and a dense range of " + std::to_string(slots) +
                          " keys, at most " + std::to_string(kMaxSlots) + " are supported");
  }
  // Short lists: eight CTAs take a few tiles a warp each, and merge without a word to memory. Four
  // take twice as many where eight would not run all at once.
  constexpr int64_t kMaxClusterSlots = 8192;
  const bool clustered = device.compute_capability == 90 && problem.index.given() &&
                         problem.num_splits == 0 && slots <= kMaxClusterSlots;
  const bool all_at_once = int64_t{plan.items} * 8 <= int64_t{device.num_sms} * 2;
  if (clustered) plan.ranks = all_at_once ? 8 : 4;
  // Without a wish about two chunks for every SM of a large GPU where there is one sequence.
  constexpr int64_t kWantedChunks = 256;
  constexpr int64_t kMinSplits = 4;
  const int64_t per_batch = plan.items_per_batch;
  int64_t splits = (kWantedChunks + per_batch - 1) / std::max<int64_t>(1, per_batch);
  splits = std::max(kMinSplits, std::min<int64_t>(splits, kMaxDecodeSplits));
  if (problem.num_splits > 0) splits = problem.num_splits;
  const int64_t least = problem.num_splits > 0 ? kTileKeys : kMinChunk;
  const int64_t chunk_keys = std::max(least, (slots + splits - 1) / splits);
  plan.chunk_keys = static_cast<int>(chunk_keys);
  plan.chunk_unit = static_cast<int>(problem.num_splits > 0 ? kTileKeys : kChunkUnit);
  plan.max_chunks = static_cast<int>(std::max<int64_t>(1, (slots + chunk_keys - 1) / chunk_keys));
  return plan;
}

std::string DecodePlan::to_string() const {
  return std::to_string(items) + " items of up to " + std::to_string(rows) + " rows x " +
         std::to_string(heads) + " heads, chunks of " + std::to_string(chunk_keys) +
         " keys, at most " + std::to_string(max_chunks) +
         (ranks > 0 ? ", clusters of " + std::to_string(ranks) : "");
}

}  // namespace attnsieve::cuda
