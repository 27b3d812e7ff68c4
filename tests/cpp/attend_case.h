// A case of cpu::attend (sizes, mask, lists, threshold …), its tensors, and a plain
// double-precision loop over it.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "attend.h"
#include "attnsieve/problem.h"

namespace attnsieve::test {

struct AttendCase {
  int64_t batch = 1, num_heads = 1, num_kv_heads = 1;
  int64_t seqlen_q = 64, seqlen_k = 64, head_dim = 64;
  DType dtype = DType::kFloat32;
  Mask mask;
  bool indexed = false;
  int block_q = 64, block_k = 64;
  double density = 0.5;             // of the lists
  int64_t list_heads = 1;
  bool malformed_lists = false;     // ids out of range, duplicates, counts beyond capacity
  bool sink = false;
  std::optional<float> threshold;
  int skip_block = 128;
  std::vector<int32_t> lengths_q, lengths_k;  // not empty: varlen, batch = their number
  int page_size = 0;  // not 0: K and V in shuffled pages, each sequence its own length
  bool bad_pages = false;  // some table entries name no page
  bool strided = false;  // [B, S, H, D] storage with padding
  float logit_scale = 1.0f;
  uint32_t seed = 1;

  std::string describe() const;
};

// One tensor: its values as the kernel sees them (after rounding to dtype) and the storage in
// dtype.
struct TensorData {
  std::vector<float> values;  // [batch or 1][heads][rows][head_dim]
  std::vector<uint8_t> storage;
  int64_t heads = 0, rows = 0, head_dim = 0;
  HeadTensor view;

  float& at(int64_t b, int64_t h, int64_t row, int64_t d) {
    return values[((b * heads + h) * rows + row) * head_dim + d];
  }
};

struct AttendData {
  explicit AttendData(const AttendCase& c);

  AttendCase spec;
  TensorData q, k, v, out;
  std::vector<float> lse, sink, lambda;
  std::vector<int32_t> counts, columns, cu_q, cu_k, block_table, seq_lens;
  std::vector<uint8_t> pages_k, pages_v;  // paged: the storage that the kernel reads
  std::vector<int64_t> counters;
  AttendProblem problem;

  void upload(TensorData& tensor);  // values -> storage (rounds the values too)
  void download(TensorData& tensor);  // storage -> values
  bool key_exists(int64_t b, int64_t key) const;  // false: its table entry names no page
  void run(const cpu::Kernels& kernels, const ParallelFor& parallel_for);
};

struct Expected {
  std::vector<double> out, lse;  // laid out as AttendData::out.values and lse
  std::vector<bool> attended;  // [batch][num_kv_heads][rows of k]: keys that any row attended to
  std::vector<int64_t> counters;
  double smallest_margin =
      1e30;  // distance of any vote from its threshold: decisions closer than rounding are luck
};

Expected expected_of(AttendData& data);

std::vector<const cpu::Kernels*> all_kernels();

}  // namespace attnsieve::test
