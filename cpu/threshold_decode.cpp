// cpu::threshold_decode: attention over a KV cache that skips tiles while it runs. An item is one
// group: the query vectors that decide together. Its splits follow one another and share the
// accumulators; what a split has seen of its own, for the votes, is `split_max`.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"
#include "decode_item.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kMaxTileKeys = 128;

class GroupRun : ItemRun {
 public:
  GroupRun(const DecodeProblem& problem, const Kernels& kernels, const Item& item,
           ItemScratch& scratch)
      : ItemRun(problem, kernels, item, scratch) {}

  void run() {
    start();
    set_log_thresholds();
    const int64_t tile_keys = problem_.threshold.skip_block;
    const int64_t tiles = (length_ + tile_keys - 1) / tile_keys;
    int64_t skipped = 0;
    for (int64_t split = 0; split < problem_.num_splits; ++split) {
      std::fill_n(scratch_.split_max, kColumns, -kInfinity);
      for (int64_t visit = split; visit < tiles; visit += problem_.num_splits) {
        // The last tile first: it holds the latest keys, whose logits tend to be large.
        const int64_t tile = visit == 0 ? tiles - 1 : visit - 1;
        if (!visit_tile(tile * tile_keys, visit == split)) ++skipped;
      }
    }
    finish();
    if (problem_.threshold.counters == nullptr) return;
    int64_t* counters =
        problem_.threshold.counters + 2 * (item_.batch * problem_.num_heads + item_.head);
    for (int head = 0; head < item_.heads; ++head) {
      counters[2 * head] = skipped;
      counters[2 * head + 1] = tiles;
    }
  }

 private:
  // -inf for 0 and NaN for anything that is no threshold: both skip nothing.
  void set_log_thresholds() {
    const Threshold& threshold = problem_.threshold;
    const float* own = threshold.per_head;
    if (own != nullptr) own += item_.batch * threshold.stride_batch;
    for (int c = 0; c < item_.columns(); ++c) {
      const int64_t head = item_.head + c % item_.heads;
      log_threshold_[c] =
          std::log(own != nullptr ? own[head * threshold.stride_head] : threshold.value);
    }
  }

  // False: every row voted to skip.
  bool visit_tile(int64_t first_key, bool always) {
    const int64_t end = min64(first_key + problem_.threshold.skip_block, length_);
    ItemStep steps[kMaxTileKeys / kUnitKeys];
    int count = 0;
    std::fill_n(scratch_.tile_max, kColumns, -kInfinity);
    for (int64_t unit = first_key; unit < end; unit += kUnitKeys) {
      ItemStep& step = steps[count];
      for (int64_t j = unit; j < min64(unit + kUnitKeys, end); ++j) gather(j, &step);
      if (step.count == 0) continue;
      float* s = scratch_.s + count * kUnitKeys * kColumns;
      logits(step, s);
      kernels_.max_over_keys(s, step.count, padded_, scratch_.tile_max);
      ++count;
    }
    if (!always && below()) return false;
    for (int c = 0; c < item_.columns(); ++c) {
      const float tile_max = scratch_.tile_max[c];
      float& max = scratch_.split_max[c];
      if (!(tile_max <= max)) max = std::isnan(max) ? max : tile_max;
    }
    for (int i = 0; i < count; ++i) attend(steps[i], scratch_.s + i * kUnitKeys * kColumns);
    return true;
  }

  // Whether no column vetoes: none sees a logit of the tile within its threshold of what it has
  // seen in this split, none has a threshold of 0 or a NaN.
  bool below() const {
    for (int c = 0; c < item_.columns(); ++c) {
      const float tile_max = scratch_.tile_max[c];
      const bool unseen = tile_max == -kInfinity && log_threshold_[c] > -kInfinity;
      if (!unseen && !(tile_max - scratch_.split_max[c] < log_threshold_[c])) return false;
    }
    return true;
  }

  float log_threshold_[kMaxDecodeGroup];
};

void check(const DecodeProblem& problem) {
  check_decode("threshold_decode", problem);
  const int32_t tile_keys = problem.threshold.skip_block;
  if (tile_keys != 64 && tile_keys != kMaxTileKeys)
    throw InvalidArgument("threshold_decode: skip_block must be 64 or 128, got " +
                          std::to_string(tile_keys));
  if (problem.num_splits < 1 || problem.num_splits > kMaxDecodeSplits)
    throw InvalidArgument("threshold_decode: 1 to " + std::to_string(kMaxDecodeSplits) +
                          " splits, got " + std::to_string(problem.num_splits));
  if (!problem.threshold.enabled || problem.index.given())
    throw InvalidArgument("threshold_decode: needs a threshold and takes no index");
}

}  // namespace

void threshold_decode(const DecodeProblem& problem, const ParallelFor& parallel_for) {
  check(problem);
  if (problem.seqlen_q == 0 && problem.threshold.counters != nullptr)
    std::fill_n(problem.threshold.counters, 2 * problem.batch * problem.num_heads, int64_t{0});
  if (problem.batch == 0 || problem.num_heads == 0 || problem.seqlen_q == 0) return;
  for_each_item(problem, Items(problem, kMaxDecodeGroup), problem.threshold.skip_block,
                parallel_for, [&](const Item& item, const Kernels& kernels, ItemScratch& scratch) {
                  GroupRun(problem, kernels, item, scratch).run();
                });
}

}  // namespace attnsieve::cpu
