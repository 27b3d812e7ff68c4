// What the ops of attention have in common besides their tensors: scale, sinks, thresholds.
#pragma once

#include <cmath>

#include "python/bindings/checks.h"

namespace attnsieve::binding {

inline float checked_scale(double softmax_scale) {
  const float scale = static_cast<float>(softmax_scale);
  if (!(scale > 0.0f) || std::isinf(scale)) {
    invalid("softmax_scale", "expected a positive finite number, got ", softmax_scale);
  }
  return scale;
}

// float32 [Hq], or nullptr.
inline const float* head_sinks(const std::optional<Tensor>& sink, int64_t num_heads,
                               const Tensor& q) {
  if (!sink) return nullptr;
  check_dim("sink", *sink, 1, "[query heads]");
  check_dtype("sink", *sink, ScalarType::Float);
  check_size("sink", *sink, 0, num_heads, "query heads");
  check_same_device("sink", *sink, q);
  check_last_contiguous("sink", *sink);
  return sink->const_data_ptr<float>();
}

// Off where neither a number nor a tensor is given.
inline Threshold make_threshold(std::optional<double> value, const std::optional<Tensor>& per_head,
                                int64_t skip_block, int64_t batch, int64_t num_heads,
                                const Tensor& q) {
  Threshold threshold;
  threshold.skip_block = check_block("skip_block", skip_block);
  threshold.enabled = value.has_value() || per_head.has_value();
  if (value) {
    if (!(*value >= 0)) invalid("threshold", "expected a number >= 0, got ", *value);
    threshold.value = static_cast<float>(*value);
  }
  if (per_head) {
    if (value) invalid("threshold", "give one number or a tensor, not both");
    check_dim("threshold", *per_head, 2, "[batch, query heads]");
    check_dtype("threshold", *per_head, ScalarType::Float);
    check_same_device("threshold", *per_head, q);
    check_size("threshold", *per_head, 0, batch, "batch");
    check_size("threshold", *per_head, 1, num_heads, "query heads");
    threshold.per_head = per_head->const_data_ptr<float>();
    threshold.stride_batch = per_head->stride(0);
    threshold.stride_head = per_head->stride(1);
  }
  return threshold;
}

}  // namespace attnsieve::binding
