// Lengths and page tables of a KV cache.
#pragma once

#include "python/bindings/checks.h"

namespace attnsieve::binding {

// An int32 tensor with one entry per sequence, or nullptr.
inline const int32_t* per_sequence(const char* name, const std::optional<Tensor>& tensor,
                                   int64_t batch, const Tensor& on) {
  if (!tensor) return nullptr;
  check_dim(name, *tensor, 1, "[batch]");
  check_dtype(name, *tensor, ScalarType::Int);
  check_size(name, *tensor, 0, batch, "batch");
  check_last_contiguous(name, *tensor);
  check_same_device(name, *tensor, on);
  return tensor->const_data_ptr<int32_t>();
}

// What the elements of a cache stand for: numbers of q's or k's own dtype, or codes.
inline Code cache_code(const char* name, const Tensor& cache, const Tensor& rows, bool takes_int8) {
  switch (cache.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Half:
    case ScalarType::BFloat16: check_dtype(name, cache, rows.scalar_type()); return Code::kNone;
    case ScalarType::Float8_e4m3fn: return Code::kFloat8E4m3;
    case ScalarType::Char:
      if (takes_int8) return Code::kInt8;
      [[fallthrough]];
    default:
      throw Unsupported(std::string(name) + " has dtype " + dtype_of(cache) + "; supported: " +
                        dtype_of(rows) + ", Float8_e4m3fn" + (takes_int8 ? ", Char (int8)" : ""));
  }
}

// float32 [Hkv] of a cache of codes; nullptr, and refused, for one without.
inline const float* head_scales(const char* name, const std::optional<Tensor>& scale, bool coded,
                                int64_t num_kv_heads, const Tensor& cache) {
  if (scale.has_value() != coded) {
    invalid(name, coded ? "must be given" : "has no meaning", " with caches of dtype ",
            dtype_of(cache));
  }
  if (!scale) return nullptr;
  check_dim(name, *scale, 1, "[kv heads]");
  check_dtype(name, *scale, ScalarType::Float);
  check_size(name, *scale, 0, num_kv_heads, "kv heads");
  check_last_contiguous(name, *scale);
  check_same_device(name, *scale, cache);
  return scale->const_data_ptr<float>();
}

// Of a cache, argument `name`, that has `num_pages` pages of `page_size` where there is a table.
inline PagedKv paged_kv(const char* name, int64_t num_pages, int64_t page_size,
                        const std::optional<Tensor>& block_table,
                        const std::optional<Tensor>& seq_lens, int64_t batch, const Tensor& on) {
  PagedKv paged;
  paged.seq_lens = per_sequence("seq_lens", seq_lens, batch, on);
  if (!block_table) return paged;
  if (!seq_lens) invalid("seq_lens", "must be given with block_table");
  check_dim("block_table", *block_table, 2, "[batch, max pages]");
  check_dtype("block_table", *block_table, ScalarType::Int);
  check_size("block_table", *block_table, 0, batch, "batch");
  check_last_contiguous("block_table", *block_table);
  check_same_device("block_table", *block_table, on);
  if (page_size <= 0) invalid(name, "page_size must be positive, got ", page_size);
  if (block_table->size(1) > INT32_MAX / page_size || num_pages > INT32_MAX / page_size) {
    invalid(name, "positions and slots must fit in int32, got ", num_pages, " pages of ", page_size,
            " and rows of ", block_table->size(1), " pages");
  }
  paged.block_table = block_table->const_data_ptr<int32_t>();
  paged.table_stride_batch = block_table->stride(0);
  paged.num_pages = num_pages;
  paged.page_size = static_cast<int32_t>(page_size);
  paged.max_pages = static_cast<int32_t>(block_table->size(1));
  return paged;
}

}  // namespace attnsieve::binding
