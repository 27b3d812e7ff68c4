// What decode and threshold_decode have in common at the torch boundary.
#pragma once

#include <tuple>

#include "python/bindings/checks.h"

namespace attnsieve::binding {

// Queries, caches, masks and sinks, checked; `op` is the row of the capability table.
DecodeProblem decode_problem(const char* op, const Tensor& q, const Tensor& k_cache,
                             const Tensor& v_cache, const std::optional<Tensor>& block_table,
                             const std::optional<Tensor>& seq_lens,
                             const std::optional<Tensor>& sink,
                             const std::optional<Tensor>& k_scale,
                             const std::optional<Tensor>& v_scale, double softmax_scale,
                             bool causal);

// (out, lse), allocated and set in the problem.
std::tuple<Tensor, Tensor> decode_outputs(const Tensor& q, DecodeProblem* problem);

}  // namespace attnsieve::binding
