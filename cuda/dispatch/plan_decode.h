// How the decode kernel cuts a problem, as a pure function of the problem: testable without a GPU.
#pragma once

#include <string>

#include "attnsieve/problem.h"
#include "cuda/dispatch/heuristics.h"

namespace attnsieve::cuda {

// Query vectors with the same keys make an item, the keys of an item are cut into chunks. Depends on
// capacities alone, so that results do not depend on what else runs.
struct DecodePlan {
  int rows = 0;  // new rows of an item: all of them, or one where every row has its own list
  int shared_heads = 0;  // query heads with one KV head and one list
  int heads = 0;  // query heads of an item, at most
  int columns = 0;  // query vectors of an item, at most: rows * heads
  int group_size = 0;  // query heads of a KV head
  int items_per_group = 0;  // of shared_heads heads
  int items_per_row = 0;
  int items_per_batch = 0;
  int items = 0;
  // An item has a chunk for every chunk_keys of its keys or a part of them, all as long as each other
  // but for one chunk_unit.
  int chunk_keys = 0;
  int chunk_unit = 0;
  int max_chunks = 0;  // of an item
  // CTAs of a cluster that has an item instead (sm_90): no chunks, no workspace. 0, 4 or 8.
  int ranks = 0;

  std::string to_string() const;
};

// For threshold_decode: the same items; the chunks of one are the results of CTAs of four splits.
DecodePlan plan_threshold_decode(const DecodeProblem& problem);

// Throws InvalidArgument where items, or the keys of one, exceed what 32 bits count.
DecodePlan plan_decode(const DecodeProblem& problem, const DeviceInfo& device);

}  // namespace attnsieve::cuda
