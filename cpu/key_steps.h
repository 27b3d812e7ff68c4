// Which keys a group of query rows walks, in which tiles and steps. Included by attend_group.cpp
// only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attend_group.h"
#include "attnsieve/visibility.h"

namespace attnsieve::cpu {

inline int64_t units_per_block(const BlockIndexView& index) {
  return index.block_k / index.unit_keys();
}

// The units of a dense group or of an index row, and how they fall into skip tiles. Position i of
// the walk is unit `unit(i)`; tile t holds positions [tile_begin(t), tile_end(t)). Dense tiles are
// aligned in key position, so the first one may start late (`phase` units are missing); listed
// tiles are cut from the start of the row, for all groups of the row alike.
struct UnitWalk {
  const int32_t* listed = nullptr;  // nullptr: consecutive units from `first`
  int64_t first = 0;
  int64_t count = 0;
  int64_t phase = 0;
  int64_t units_per_tile = 1;
  int unit_keys = kUnitKeys;

  int64_t unit(int64_t i) const { return listed ? listed[i] : first + i; }
  int64_t tiles() const {
    return count == 0 ? 0 : (count + phase + units_per_tile - 1) / units_per_tile;
  }
  int64_t tile_begin(int64_t t) const { return max64(0, t * units_per_tile - phase); }
  int64_t tile_end(int64_t t) const { return min64(count, (t + 1) * units_per_tile - phase); }

  // The keys of position i that lie in `visible`; begin >= end where there are none.
  KeyRange keys(int64_t i, KeyRange visible) const {
    const int64_t begin = unit(i) * unit_keys;
    return {max64(begin, visible.begin), min64(begin + unit_keys, visible.end)};
  }
};

// Keys visible to the index row that holds the group: all its groups share one cut into tiles.
inline KeyRange keys_of_index_row(const AttendProblem& problem, const Group& group) {
  const int64_t block_q = problem.index.block_q;
  const int64_t row_begin = group.row_begin / block_q * block_q;
  return visible_keys(problem.mask, row_begin, min64(row_begin + block_q, group.seqlen_q),
                      group.seqlen_q, group.seqlen_k);
}

inline UnitWalk plan_walk(const AttendProblem& problem, const Group& group, KeyRange visible,
                          int32_t* units) {
  UnitWalk walk;
  if (visible.begin >= visible.end) return walk;
  const BlockIndexView& index = problem.index;
  if (problem.is_indexed()) {
    walk.unit_keys = index.unit_keys();
    visible = keys_of_index_row(problem, group);
  }
  walk.units_per_tile = problem.threshold.skip_block / walk.unit_keys;
  const int64_t unit_begin = visible.begin / walk.unit_keys;
  const int64_t unit_end = (visible.end + walk.unit_keys - 1) / walk.unit_keys;
  if (!problem.is_indexed()) {
    walk.first = unit_begin;
    walk.count = unit_end - unit_begin;
    walk.phase = unit_begin % walk.units_per_tile;
    return walk;
  }
  walk.listed = units;
  const int64_t row = group.row_begin / index.block_q;
  if (row >= index.num_rows) return walk;
  const int64_t list = group.head / index.heads_per_list;
  const int32_t* counts =
      index.counts + group.batch * index.counts_stride_batch + list * index.counts_stride_head;
  const int32_t* columns = index.columns + group.batch * index.columns_stride_batch +
                           list * index.columns_stride_head + row * index.columns_stride_row;
  const int32_t count = std::clamp(counts[row], 0, index.capacity);
  const int64_t blocks = (group.seqlen_k + index.block_k - 1) / index.block_k;
  const int64_t width = units_per_block(index);
  for (int32_t i = 0; i < count; ++i) {
    const int64_t block = columns[i];
    if (block < 0 || block >= blocks) continue;
    for (int64_t u = block * width; u < (block + 1) * width; ++u) {
      if (u >= unit_begin && u < unit_end) units[walk.count++] = static_cast<int32_t>(u);
    }
  }
  return walk;
}

// Keys that lie side by side in memory: rows [row, row + count) of `page` (0 where K and V are not
// paged) hold keys [key, key + count).
struct KeyRun {
  int64_t key;
  int64_t page;
  int64_t row;
  int count;
};

// What one round of the online softmax takes in: up to kUnitKeys keys that some row of the group
// sees, one full unit or several small ones of a tile. `masked`: not every row sees all of them.
struct KeyStep {
  static constexpr int kMaxRuns = kUnitKeys / 16;  // pages and units are multiples of 16 keys

  int count = 0;
  bool masked = false;
  int num_runs = 0;
  KeyRun runs[kMaxRuns];
};

class KeySteps {
 public:
  KeySteps(const AttendProblem& problem, const Group& group, const GroupScratch& scratch,
           KeyRange visible)
      : group_(group), visible_(visible) {
    // Both ends of a row's range grow with the row: the last row begins last, the first ends first.
    seen_by_all_ = {scratch.key_begin[group.rows - 1], scratch.key_end[0]};
    if (!problem.is_paged()) return;
    num_pages_ = problem.paged.num_pages;
    page_size_ = problem.paged.page_size;
    pages_ = problem.paged.block_table + group.batch * problem.paged.table_stride_batch;
  }

  // Whether a row of the group sees a key of the tile.
  bool sees(const UnitWalk& walk, int64_t tile) const {
    for (int64_t i = walk.tile_begin(tile); i < walk.tile_end(tile); ++i) {
      const KeyRange keys = walk.keys(i, visible_);
      if (keys.begin < keys.end) return true;
    }
    return false;
  }

  // The step that starts at position *i of the walk and ends before `end`; moves *i behind it.
  KeyStep next(const UnitWalk& walk, int64_t* i, int64_t end) const {
    KeyStep step;
    const int64_t step_end = min64(end, *i + kUnitKeys / walk.unit_keys);
    for (; *i < step_end; ++*i) {
      const KeyRange keys = walk.keys(*i, visible_);
      if (keys.begin >= keys.end) continue;
      step.masked = step.masked || keys.begin < seen_by_all_.begin || keys.end > seen_by_all_.end;
      if (pages_ == nullptr) {
        append(&step, {keys.begin, 0, group_.k_start + keys.begin,
                       static_cast<int>(keys.end - keys.begin)});
      } else {
        append_pages(&step, keys);
      }
    }
    return step;
  }

 private:
  static void append(KeyStep* step, const KeyRun& run) {
    step->runs[step->num_runs++] = run;
    step->count += run.count;
  }

  // A page that does not exist is left out: its keys are masked for every row.
  void append_pages(KeyStep* step, KeyRange keys) const {
    for (int64_t key = keys.begin; key < keys.end;) {
      const int64_t slot = key / page_size_;
      const int64_t run_end = min64(keys.end, (slot + 1) * page_size_);
      const int64_t page = pages_[slot];
      if (page >= 0 && page < num_pages_) {
        append(step, {key, page, key - slot * page_size_, static_cast<int>(run_end - key)});
      }
      key = run_end;
    }
  }

  const Group& group_;
  KeyRange visible_;
  KeyRange seen_by_all_;
  const int32_t* pages_ = nullptr;  // nullptr: not paged
  int64_t num_pages_ = 0;
  int64_t page_size_ = 0;
};

}  // namespace attnsieve::cpu
