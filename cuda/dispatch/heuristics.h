// Choices the host makes before a launch, as pure functions of the problem: testable without a GPU.
#pragma once

#include <string>

#include "attnsieve/capability.h"
#include "attnsieve/problem.h"
#include "attnsieve/visibility.h"

namespace attnsieve::cuda {

struct DeviceInfo {
  int compute_capability = 0;  // 80, 86, 90 ...
  int num_sms = 0;
};

// The device that kernels are chosen for where `forced` names a family (backend_name), for tests and
// comparisons: sm_80 makes newer ones 8.9. nullptr or "": no wish. Throws for names that are none, and
// for sm_90 on a device that cannot run it.
DeviceInfo device_of_family(DeviceInfo device, const char* forced);

// The kernel family that runs `attend` on a device: the newest that serves the problem.
Backend choose_attend_backend(const AttendProblem& problem, const DeviceInfo& device);

// Threads of a row-selection CTA: enough to cover the row, at most 256.
int select_threads(int64_t num_k_blocks);

}  // namespace attnsieve::cuda

namespace attnsieve::sm80 {

// Candidates that a CTA of a split list can mark, 32 for each of its threads.
inline constexpr int64_t kMaxSplitCandidates = 512 * 32;

// Columns of lists that are sampled: shared memory has a bit for each.
inline constexpr int64_t kMaxSampledColumns = 128 * 1024;
inline constexpr int64_t kMaxSampledColumnsOfCluster = 1024 * 1024;

struct SelectTokensPlan {
  int threads = 0;  // of a CTA that owns a list
  int parts = 1;  // CTAs that share a list over several launches; then they have 512 threads
  int ranks = 1;  // CTAs of a cluster that share a list in one launch (sm_90); 1, 2, 4 or 8
  bool sampled = false;  // a floor from a sample of the scores first: one sweep instead of four
};

// How many threads select from a list. From shapes alone: lengths are not known to the host.
SelectTokensPlan plan_select_tokens(const TokenSelectProblem& problem,
                                    const cuda::DeviceInfo& device);

}  // namespace attnsieve::sm80

namespace attnsieve::sm90 {

// Votes on 128 keys at once end here: S of 128 keys beside a wider O exceeds a thread's registers.
inline constexpr int kMaxHeadDimOfWideVotes = 128;

// How the sm_90 attend kernel is set up for a problem.
struct AttendPlan {
  int warpgroups = 0;  // of 64 query rows each
  int tile_n = 0;  // keys of a tile
  int piece_keys = 0;  // keys of one bulk copy; a tile is composed of them
  bool voted = false;  // the kernel with tile votes
  bool interleaved = false;  // shared-memory layout that composes tiles of pieces below 64 keys
  bool pack_heads = false;  // the warpgroups work on heads of one KV group instead of on rows
  bool self_fed = false;  // the warpgroup has no producer warps beside it
  bool persistent = false;  // as many CTAs as fit the device instead of one per work item
  bool dynamic = false;  // and each takes its next item when it nears the end of one

  std::string to_string() const;
};

// Throws Unsupported for votes on more keys than the head_dim leaves registers for.
AttendPlan plan_attend(const AttendProblem& problem);

// In a dense problem with a right bound, neighbouring 64-row groups share their last KV tile in
// pairs; which pairs depends on the diagonal. Row tiles start one group early where the odd groups
// lead: then the tile visited first is the last tile of both warpgroups. For tiles of 128 keys: those
// of 64 are not shared in pairs.
ATTNSIEVE_HD int first_row_of_tiles(int end_shift, int tile_keys) {
  const int last_key = (kGroupRows - 1 + end_shift - 1) % tile_keys;  // of group 0, before clamping
  const int in_tile = last_key < 0 ? last_key + tile_keys : last_key;
  return in_tile < tile_keys - kGroupRows ? 0 : -kGroupRows;
}

}  // namespace attnsieve::sm90
