// One work item of cpu::attend: 64 query rows of one head of one sequence, from Q to stored rows.
#pragma once

#include <cstdint>

#include "attnsieve/problem.h"
#include "kernels.h"

namespace attnsieve::cpu {

inline constexpr int kMaxSkipBlock = 128;

// Where the group's rows and keys lie. Rows and keys count from the start of the sequence;
// `q_start` and `k_start` are the sequence's first tokens (0 for batched problems).
struct Group {
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row_begin = 0;
  int rows = 0;
  int64_t q_start = 0;
  int64_t k_start = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
};

struct TileCounts {
  int64_t skipped = 0;
  int64_t total = 0;
};

// The buffers of one thread, all 64-byte aligned, in one allocation.
class GroupScratch {
 public:
  GroupScratch() = default;
  GroupScratch(const GroupScratch&) = delete;
  GroupScratch& operator=(const GroupScratch&) = delete;
  ~GroupScratch();

  // False when there is no memory: the caller is inside a parallel body and may not throw.
  bool allocate(const AttendProblem& problem);

  float* query_t = nullptr;  // [head_dim][kColumns]
  float* out_t = nullptr;    // [head_dim][kColumns]
  float* tile = nullptr;     // [kMaxSkipBlock][kColumns]: logits, then probabilities
  float* widened = nullptr;  // [kUnitKeys][head_dim]: a unit of K or V in float32
  float* row_max = nullptr;  // this and the following: one value a row, [kColumns]
  float* row_sum = nullptr;
  float* rescale = nullptr;
  float* tile_max = nullptr;
  int64_t* key_begin = nullptr;  // keys visible to the row
  int64_t* key_end = nullptr;
  int32_t* units = nullptr;  // [capacity * units per block]: the units of the group's list

 private:
  void* memory_ = nullptr;
};

TileCounts attend_group(const AttendProblem& problem, const Kernels& kernels, const Group& group,
                        GroupScratch& scratch);

}  // namespace attnsieve::cpu
