// What the host hands the proxy_scores kernels.
#pragma once

#include "attnsieve/problem.h"
#include "cuda/dispatch/cache_plans.h"

namespace attnsieve::sm80 {

// Of a softmax: the largest score and the sum of exp(score - max); once complete, 1 / sum.
struct SoftmaxTotal {
  float max;
  float sum;
};

struct ProxyScoresArguments {
  ProxyScoresProblem problem;
  ProxyScoresPlan plan;
  bool aligned_codes = false;  // rows of codes begin at multiples of 8 bytes
  void* projected = nullptr;             // [B, Hq, R, dp], where a launch of its own projects
  SoftmaxTotal* chunk_totals = nullptr;  // [B, out_rows, Hq, chunks]
  SoftmaxTotal* totals = nullptr;        // [B, out_rows, Hq]
};

}  // namespace attnsieve::sm80
