// fetch_tokens: checks, tensors -> FetchProblem.
#include "attnsieve/fetch.h"

#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/layout.h"
#include "python/bindings/ops.h"

namespace attnsieve::binding {
namespace {

const int32_t* words_of(const char* argument, const Tensor& tensor, const Tensor& on) {
  check_dtype(argument, tensor, ScalarType::Int);
  check_same_device(argument, tensor, on);
  if (!tensor.is_contiguous()) invalid(argument, "must be contiguous");
  return tensor.const_data_ptr<int32_t>();
}

// Rows of a cache or of slots, strides in bytes.
HeadTensor rows_of(const char* argument, const Tensor& rows, const Tensor& indices,
                   const Tensor& k) {
  check_dim(argument, rows, 4, "[batch, heads, tokens, head_dim]");
  check_dtype(argument, rows, k.scalar_type());
  check_same_device(argument, rows, indices);
  check_size(argument, rows, 0, indices.size(0), "batch");
  check_size(argument, rows, 1, indices.size(1), "lists");
  check_size(argument, rows, 3, k.size(3), "head_dim of k");
  check_aligned_rows(argument, rows);
  HeadTensor found = head_tensor(rows, kBatched);
  const int64_t bytes = rows.element_size();
  found.stride_batch *= bytes;
  found.stride_head *= bytes;
  found.stride_row *= bytes;
  return found;
}

}  // namespace

Tensor fetch_tokens(const Tensor& indices, const Tensor& counts, const Tensor& k, const Tensor& v,
                    const Tensor& slots, const Tensor& k_slots, const Tensor& v_slots,
                    const std::optional<Tensor>& first_new, const std::optional<Tensor>& moved) {
  check_dim("indices", indices, 3, "[batch, heads, k]");
  check_dim("counts", counts, 2, "[batch, heads]");
  check_dim("slots", slots, 3, "[batch, heads, slots]");
  for (int64_t dim = 0; dim < 2; ++dim) {
    check_size("counts", counts, dim, indices.size(dim), "as indices");
    check_size("slots", slots, dim, indices.size(dim), "as indices");
  }
  FetchProblem problem;
  problem.indices = words_of("indices", indices, indices);
  problem.counts = words_of("counts", counts, indices);
  problem.slots = const_cast<int32_t*>(words_of("slots", slots, indices));
  problem.k = rows_of("k", k, indices, k);
  problem.v = rows_of("v", v, indices, k);
  problem.k_slots = rows_of("k_slots", k_slots, indices, k);
  problem.v_slots = rows_of("v_slots", v_slots, indices, k);
  check_size("v", v, 2, k.size(2), "tokens of k");
  check_size("k_slots", k_slots, 2, slots.size(2), "slots");
  check_size("v_slots", v_slots, 2, slots.size(2), "slots");
  if (first_new.has_value()) {
    check_dim("first_new", *first_new, 1, "[batch]");
    check_size("first_new", *first_new, 0, indices.size(0), "batch");
    problem.first_new = words_of("first_new", *first_new, indices);
  }
  if (moved.has_value()) {
    check_dim("moved", *moved, 1, "[2]");
    check_size("moved", *moved, 0, 2, "listed and copied");
    check_dtype("moved", *moved, ScalarType::Long);
    check_same_device("moved", *moved, indices);
    check_last_contiguous("moved", *moved);
    problem.moved = moved->mutable_data_ptr<int64_t>();
  }
  for (const auto& [name, size] : {std::pair<const char*, int64_t>{"indices", indices.size(2)},
                                   {"slots", slots.size(2)},
                                   {"k", k.size(2)}}) {
    if (size > INT32_MAX) invalid(name, "positions do not fit in int32");
  }
  problem.batch = indices.size(0);
  problem.num_heads = indices.size(1);
  problem.num_tokens = k.size(2);
  problem.num_slots = static_cast<int32_t>(slots.size(2));
  problem.capacity = static_cast<int32_t>(indices.size(2));
  problem.row_bytes = k.size(3) * static_cast<int64_t>(k.element_size());
  require_supported("fetch_tokens", indices.is_cuda() ? Backend::kSm80 : Backend::kCpu,
                    element_dtype("k", k), k.size(3));
  check_fetch(problem);

  const std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  const Tensor positions = empty(sizes, aoti_torch_dtype_int32(), indices);
  problem.positions = positions.mutable_data_ptr<int32_t>();
  std::optional<Tensor> workspace;
  if (indices.is_cuda()) {
    const auto bytes = static_cast<int64_t>(cuda::fetch_workspace_bytes(problem));
    workspace = empty({bytes}, aoti_torch_dtype_uint8(), indices);
    problem.workspace = workspace->mutable_data_ptr();
  }
  run<FetchProblem>(indices, problem, cpu::fetch_tokens, cuda::fetch_tokens);
  return positions;
}

}  // namespace attnsieve::binding
