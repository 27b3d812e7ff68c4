// A borrowed view of tensor memory: pointer, sizes, int64 element strides. Owns nothing.
#pragma once

#include <cstdint>

namespace attnsieve {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
  }
  return "unknown";
}

// One-byte elements of a cache: a number is code * scale. kNone: elements of some DType.
enum class Code : int32_t { kNone, kFloat8E4m3, kInt8 };

// A [batch, heads, seqlen, head_dim] tensor whose last dimension is contiguous. Strides count
// elements. Varlen tensors [tokens, heads, head_dim] are viewed with seqlen = all tokens and
// stride_batch = 0: the sequence's first token comes from cu_seqlens.
struct HeadTensor {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_row = 0;
};

// A float32 [batch, heads, seqlen] tensor (log-sum-exp). Same varlen convention as HeadTensor.
struct RowTensor {
  float* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_row = 0;
};

}  // namespace attnsieve
