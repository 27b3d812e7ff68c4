// What the host hands the decode kernel: the problem, how it is cut, and where partial results go.
#pragma once

#include "attnsieve/problem.h"
#include "cuda/dispatch/heuristics.h"

namespace attnsieve::sm80 {

// Query vectors that share their keys: `heads` query heads of one KV head and one list, with `rows`
// new rows. Column c of an item is row c / heads, head c % heads.
struct DecodeArguments {
  DecodeProblem problem;
  cuda::DecodePlan plan;
  // Of chunk c of item i, at slot i * plan.max_chunks + c:
  float* partial_out;  // [columns, head_dim], not normalised
  float* partial_max;  // [columns], unscaled logits
  float* partial_sum;  // [columns]
  unsigned* arrivals;  // [items], zero before the launch: chunks that are done
};

}  // namespace attnsieve::sm80
