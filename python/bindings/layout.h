// Tensors of attention as views of the problem structs, and how outputs are laid out.
#pragma once

#include <vector>

#include "python/bindings/checks.h"

namespace attnsieve::binding {

// Dimension numbers; what comes before them is the batch or the page.
struct Dims {
  int64_t head;
  int64_t row;
  int64_t last;
};

constexpr Dims kBatched{1, 2, 3};
constexpr Dims kVarlen{1, 0, 2};
constexpr Dims kPaged{2, 1, 3};

inline HeadTensor head_tensor(const Tensor& tensor, const Dims& dims) {
  const bool has_batch = tensor.dim() == 4;
  return {const_cast<void*>(tensor.const_data_ptr()), has_batch ? tensor.stride(0) : 0,
          tensor.stride(dims.head), tensor.stride(dims.row)};
}

// Same memory order as q where q is a [B, S, H, D] tensor seen as [B, H, S, D]; contiguous
// otherwise. python/attnsieve/_fake.py repeats this rule.
inline Tensor allocate_out(const Tensor& q, bool varlen) {
  const std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
  if (!varlen && sizes[1] > 1 && sizes[2] > 1 && q.stride(1) < q.stride(2) && q.stride(1) != 0) {
    const int64_t heads = sizes[1];
    const int64_t head_dim = sizes[3];
    return empty_strided(sizes, {sizes[2] * heads * head_dim, head_dim, heads * head_dim, 1},
                         raw_dtype(q), q);
  }
  return empty(sizes, raw_dtype(q), q);
}

inline RowTensor row_tensor(const Tensor& lse, bool varlen) {
  auto* data = lse.mutable_data_ptr<float>();
  if (varlen) return {data, 0, lse.stride(1), lse.stride(0)};
  return {data, lse.stride(0), lse.stride(1), lse.stride(2)};
}

}  // namespace attnsieve::binding
