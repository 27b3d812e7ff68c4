// What the host hands the append_kv kernel.
#pragma once

#include "attnsieve/problem.h"
#include "cuda/dispatch/cache_plans.h"

namespace attnsieve::sm80 {

struct AppendKvArguments {
  AppendKvProblem problem;
  AppendKvPlan plan;
  bool aligned_codes = false;  // rows of float8 caches begin at multiples of 8 bytes
};

}  // namespace attnsieve::sm80
