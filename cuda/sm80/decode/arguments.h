// What the host hands the decode kernel: the problem, how it is cut, and where partial results go.
#pragma once

#include <cutlass/fast_math.h>

#include "attnsieve/problem.h"
#include "cuda/dispatch/plan_decode.h"

namespace attnsieve::sm80 {

struct DecodeArguments {
  DecodeProblem problem;
  cuda::DecodePlan plan;
  cutlass::FastDivmod index_page;  // keys of an entry
  cutlass::FastDivmod cache_page;
  // Of chunk c of item i, at slot i * plan.max_chunks + c:
  float* partial_out;  // [columns, head_dim], not normalised
  float2* partial_state;  // [columns]: maximum, an unscaled logit, and sum
  unsigned* arrivals;  // [items], zero before the launch: chunks that are done
};

}  // namespace attnsieve::sm80
