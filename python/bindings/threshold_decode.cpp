// threshold_decode: checks of threshold and splits, tensors -> DecodeProblem.
#include "python/bindings/backend.h"
#include "python/bindings/decode_problem.h"
#include "python/bindings/ops.h"
#include "python/bindings/rules.h"

namespace attnsieve::binding {

std::tuple<Tensor, Tensor, Tensor> threshold_decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
    const std::optional<Tensor>& sink, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, std::optional<double> threshold,
    const std::optional<Tensor>& threshold_per_head, int64_t skip_block, int64_t num_splits,
    double softmax_scale, bool causal) {
  DecodeProblem problem = decode_problem("threshold_decode", q, k_cache, v_cache, block_table,
                                         seq_lens, sink, k_scale, v_scale, softmax_scale, causal);
  problem.threshold = make_threshold(threshold, threshold_per_head, skip_block, problem.batch,
                                     problem.num_heads, q);
  if (!problem.threshold.enabled) invalid("threshold", "must be given; decode computes all keys");
  if (num_splits < 1 || num_splits > kMaxDecodeSplits) {
    invalid("num_splits", "expected a number in [1, ", kMaxDecodeSplits, "], got ", num_splits);
  }
  problem.num_splits = static_cast<int32_t>(num_splits);
  const auto [out, lse] = decode_outputs(q, &problem);
  const Tensor counters = empty({problem.batch, problem.num_heads, 2}, aoti_torch_dtype_int64(), q);
  problem.threshold.counters = counters.mutable_data_ptr<int64_t>();
  std::optional<Tensor> workspace;
  if (q.is_cuda()) {
    const DeviceScope scope(q);
    const int64_t bytes = static_cast<int64_t>(cuda::threshold_decode_workspace_bytes(problem));
    if (bytes > 0) {
      workspace = empty({bytes}, aoti_torch_dtype_uint8(), q);
      problem.workspace = workspace->mutable_data_ptr();
    }
  }
  run<DecodeProblem>(q, problem, cpu::threshold_decode, cuda::threshold_decode);
  return {out, lse, counters};
}

}  // namespace attnsieve::binding
