// Queries narrowed by a matrix each, for cpu::proxy_scores.
#pragma once

#include <vector>

#include "attnsieve/launch.h"
#include "attnsieve/problem.h"

namespace attnsieve::cpu {

// `problem`, which has a projection, without one: its q lies in `rows`.
ProxyScoresProblem project_queries(const ProxyScoresProblem& problem,
                                   const ParallelFor& parallel_for, std::vector<char>* rows);

}  // namespace attnsieve::cpu
