// What is supported, as data: one row per (op, backend). The dispatchers refuse by it, the doctor
// and the README print it, the tests expect it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "attnsieve/status.h"
#include "attnsieve/tensor_view.h"

namespace attnsieve {

enum class Backend { kCpu, kSm80, kSm90 };

inline const char* backend_name(Backend backend) {
  switch (backend) {
    case Backend::kCpu: return "cpu";
    case Backend::kSm80: return "sm_80";
    case Backend::kSm90: return "sm_90";
  }
  return "unknown";
}

struct Capability {
  const char* op;
  Backend backend;
  std::vector<DType> dtypes;
  std::vector<int> head_dims;  // empty: every multiple of 8 up to max_head_dim
  int max_head_dim;
  const char* features;

  bool supports(DType dtype, int64_t head_dim) const {
    if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) return false;
    if (head_dims.empty()) return head_dim > 0 && head_dim % 8 == 0 && head_dim <= max_head_dim;
    return std::find(head_dims.begin(), head_dims.end(), static_cast<int>(head_dim)) !=
           head_dims.end();
  }

  // "dtype in {float16, bfloat16} and head_dim in {64, 128}"
  std::string supported() const {
    std::string text = "dtype in {";
    for (size_t i = 0; i < dtypes.size(); ++i)
      text += (i > 0 ? ", " : "") + std::string(dtype_name(dtypes[i]));
    text += "} and head_dim ";
    if (head_dims.empty()) return text + "a multiple of 8 up to " + std::to_string(max_head_dim);
    text += "in {";
    for (size_t i = 0; i < head_dims.size(); ++i)
      text += (i > 0 ? ", " : "") + std::to_string(head_dims[i]);
    return text + "}";
  }
};

inline const std::vector<Capability>& capabilities() {
  static const char* const kAttendFeatures =
      "dense, BlockIndex (block_q in {64, 128}, block_k in {16, 32, 64, 128}), causal, window, "
      "GQA, "
      "varlen, paged, strides, lse, sink, threshold";
  static const char* const kDecodeFeatures =
      "everything, TokenIndex (tokens, pages, slots), dense range, 1 to 8 rows, GQA, paged (any "
      "page_size), float8_e4m3 cache, lse, sink";
  static const char* const kThresholdDecodeFeatures =
      "lambda per sequence or query head, splits, counters, 1 to 8 rows, GQA, contiguous, paged "
      "(any "
      "page_size), float8_e4m3 cache, lse, sink";
  static const char* const kDecodeClusterFeatures =
      "lists of few keys by thread block clusters; the rest as sm_80";
  static const char* const kSelectFeatures =
      "top-k, fraction, top-p; sink, local and diagonal blocks; causal, window";
  static const char* const kTokenFeatures =
      "tokens, pages; any budget; sink and recent ranges; causal rows; slots through a page table";
  static const char* const kTokenClusterFeatures =
      "few long lists by thread block clusters; the rest as sm_80";
  static const char* const kProxyFeatures =
      "dot, ReLU dot, page bounds; float8_e4m3 and int8 keys; max, mean, sum over rows, heads, "
      "pages; softmax; projected queries; GQA, paged, causal rows";
  static const char* const kAppendFeatures =
      "contiguous, paged (any page_size), packed rows; float8_e4m3 cache; page bounds; projected "
      "keys";
  static const char* const kFetchFeatures =
      "rows of pinned host memory or of the device; tokens written again; counters";
  static const char* const kQuantizeFeatures =
      "8 and 4 bits; scales of rows, blocks, MMA fragments; smoothing; varlen";
  static const char* const kEstimateFeatures =
      "8 and 4 bits; block maxima less a threshold per row, their bits, or sums of exponentials; "
      "every n-th row, pooled keys; GQA, causal, window, varlen";
  static const char* const kMarkedFeatures =
      "bits of blocks to lists; sink, local and diagonal blocks; bounded lists; causal, window, "
      "varlen";
  static const std::vector<Capability> table = {
      {"attend",
       Backend::kCpu,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kAttendFeatures},
      {"attend",
       Backend::kSm80,
       {DType::kFloat16, DType::kBFloat16},
       {64, 128},
       128,
       kAttendFeatures},
      {"attend",
       Backend::kSm90,
       {DType::kFloat16, DType::kBFloat16},
       {64, 96, 128, 256},
       256,
       kAttendFeatures},
      {"decode",
       Backend::kCpu,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kDecodeFeatures},
      {"decode",
       Backend::kSm80,
       {DType::kFloat16, DType::kBFloat16},
       {64, 128},
       128,
       kDecodeFeatures},
      {"decode",
       Backend::kSm90,
       {DType::kFloat16, DType::kBFloat16},
       {64, 128},
       128,
       kDecodeClusterFeatures},
      {"threshold_decode",
       Backend::kCpu,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kThresholdDecodeFeatures},
      {"threshold_decode",
       Backend::kSm80,
       {DType::kFloat16, DType::kBFloat16},
       {64, 128},
       128,
       kThresholdDecodeFeatures},
      {"proxy_scores",
       Backend::kCpu,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kProxyFeatures},
      {"proxy_scores",
       Backend::kSm80,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kProxyFeatures},
      {"append_kv",
       Backend::kCpu,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kAppendFeatures},
      {"append_kv",
       Backend::kSm80,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kAppendFeatures},
      {"fetch_tokens",
       Backend::kCpu,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kFetchFeatures},
      {"fetch_tokens",
       Backend::kSm80,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kFetchFeatures},
      {"merge_states",
       Backend::kCpu,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       1024,
       "any number of states"},
      {"merge_states",
       Backend::kSm80,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       1024,
       "any number of states"},
      {"quantize_blocks",
       Backend::kCpu,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kQuantizeFeatures},
      {"quantize_blocks",
       Backend::kSm80,
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
       {},
       256,
       kQuantizeFeatures},
      {"estimate_block_scores", Backend::kCpu, {DType::kFloat32}, {}, 256, kEstimateFeatures},
      {"estimate_block_scores",
       Backend::kSm80,
       {DType::kFloat32},
       {64, 96, 128, 256},
       256,
       kEstimateFeatures},
      {"estimate_block_scores",
       Backend::kSm90,
       {DType::kFloat32},
       {64, 96, 128},
       128,
       "maxima and bits of at most 64 sampled rows a block; the rest as sm_80"},
      {"select_blocks", Backend::kCpu, {DType::kFloat32}, {}, 0, kSelectFeatures},
      {"select_blocks", Backend::kSm80, {DType::kFloat32}, {}, 0, kSelectFeatures},
      {"select_marked", Backend::kCpu, {DType::kFloat32}, {}, 0, kMarkedFeatures},
      {"select_marked", Backend::kSm80, {DType::kFloat32}, {}, 0, kMarkedFeatures},
      {"select_topk", Backend::kCpu, {DType::kFloat32}, {}, 0, kTokenFeatures},
      {"select_topk", Backend::kSm80, {DType::kFloat32}, {}, 0, kTokenFeatures},
      {"select_topk", Backend::kSm90, {DType::kFloat32}, {}, 0, kTokenClusterFeatures},
      {"select_threshold", Backend::kCpu, {DType::kFloat32}, {}, 0, kTokenFeatures},
      {"select_threshold", Backend::kSm80, {DType::kFloat32}, {}, 0, kTokenFeatures},
      {"select_threshold", Backend::kSm90, {DType::kFloat32}, {}, 0, kTokenClusterFeatures},
  };
  return table;
}

inline const Capability& capability(const std::string& op, Backend backend) {
  for (const Capability& row : capabilities()) {
    if (row.op == op && row.backend == backend) return row;
  }
  throw Unsupported(op + " has no " + backend_name(backend) + " backend");
}

// Throws Unsupported with the supported set unless the backend serves (dtype, head_dim).
inline void require_supported(const std::string& op, Backend backend, DType dtype,
                              int64_t head_dim) {
  const Capability& row = capability(op, backend);
  if (row.supports(dtype, head_dim)) return;
  throw Unsupported(op + " on " + backend_name(backend) + " got dtype " + dtype_name(dtype) +
                    ", head_dim " + std::to_string(head_dim) + "; supported: " + row.supported());
}

}  // namespace attnsieve
