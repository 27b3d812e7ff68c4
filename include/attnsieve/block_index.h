// BlockIndex: which KV blocks each block of query rows attends to. Fields and invariants as in the
// semantics:
//   counts  int32 [B, Hidx, nQ]            blocks kept by the row, 0 <= counts <= capacity
//   columns int32 [B, Hidx, nQ, capacity]  KV block ids; entries past `counts` are never read
// Canonical rows are strictly increasing. Non-canonical entries are safe: ids outside [0, nK) are
// skipped, counts are clamped to [0, capacity], a duplicate is attended twice.
#pragma once

#include <cstdint>

namespace attnsieve {

// Keys of a full unit. A list is walked, trimmed to what is visible and cut into tiles in units of
// min(block_k, kUnitKeys) consecutive keys.
inline constexpr int kUnitKeys = 64;
// Query rows that share one threshold decision.
inline constexpr int kGroupRows = 64;

struct BlockIndexView {
  const int32_t* counts = nullptr;   // nullptr: no index, attend to every visible key
  const int32_t* columns = nullptr;
  int64_t counts_stride_batch = 0;   // 0 where Hidx or B broadcasts
  int64_t counts_stride_head = 0;
  int64_t columns_stride_batch = 0;
  int64_t columns_stride_head = 0;
  int64_t columns_stride_row = 0;    // = capacity for a contiguous tensor
  int32_t num_rows = 0;              // nQ; rows of q beyond it attend to nothing
  int32_t capacity = 0;
  int32_t heads_per_list = 1;        // query head h reads list h / heads_per_list
  int32_t block_q = 64;              // 64 or 128
  int32_t block_k = 64;              // 16, 32, 64 or 128

  constexpr int32_t unit_keys() const { return block_k < kUnitKeys ? block_k : kUnitKeys; }
};

// TokenIndex: which cached tokens or pages each new query row attends to.
//   indices int32 [B, Hidx, k], or [B, Sq, Hidx, k] for lists of each row's own
//   counts  int32, the same without k; nullptr: all k entries are read
// Entry e stands for the keys [e * page_size, (e + 1) * page_size). Negative entries and keys beyond
// the sequence are skipped, counts are clamped to [0, k], a repeated entry is attended twice.
struct TokenIndexView {
  const int32_t* indices = nullptr;
  const int32_t* counts = nullptr;
  int64_t indices_stride_batch = 0;
  int64_t indices_stride_row = 0;
  int64_t indices_stride_head = 0;
  int64_t counts_stride_batch = 0;
  int64_t counts_stride_row = 0;
  int64_t counts_stride_head = 0;
  int32_t num_rows = 1;  // 1: one list serves all new rows
  int32_t capacity = 0;  // k
  int32_t heads_per_list = 0;  // query head h reads list h / heads_per_list; 0: no index, attend to
  // every visible key (empty lists may have no memory)
  int64_t page_size = 1;
  bool physical = false;  // entries are slots page * PagedKv::page_size + row, not positions

  constexpr bool given() const { return heads_per_list > 0; }
  constexpr bool per_row() const { return given() && num_rows > 1; }
};

}  // namespace attnsieve
