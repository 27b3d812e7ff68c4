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
  int chunk_keys = 0;
  int max_chunks = 0;  // of an item
  bool clustered = false;  // a cluster of CTAs an item instead (sm_90): no chunks, no workspace

  std::string to_string() const;
};

// Throws InvalidArgument where items, or the keys of one, exceed what 32 bits count.
DecodePlan plan_decode(const DecodeProblem& problem, const DeviceInfo& device);

}  // namespace attnsieve::cuda
