// One case of the attend bench and its inputs on the host.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "attnsieve/problem.h"

namespace attnsieve::bench {

struct BenchCase {
  int64_t batch = 1, num_heads = 16, num_kv_heads = 16;
  int64_t seqlen_q = 0, seqlen_k = 0, head_dim = 128;
  DType dtype = DType::kBFloat16;
  int32_t block_q = 128, block_k = 128;
  double density = 1.0;  // share of a row's visible blocks that its list keeps
  bool indexed = false;
  bool causal = false;
  std::optional<float> threshold;

  // "sparse d128 L32768 h16 block64 density0.1": the names used by every results file.
  std::string name() const;
  // q's shape as JSON: "[1, 16, 32768, 128]"
  std::string shape() const;

  int64_t num_q_blocks() const { return (seqlen_q + block_q - 1) / block_q; }
  int64_t num_k_blocks() const { return (seqlen_k + block_k - 1) / block_k; }
  Mask mask() const;
};

// Host copies of everything a call reads. Tensors are contiguous [B, H, S, D] in the case's dtype.
struct BenchInputs {
  std::vector<uint8_t> q, k, v;
  std::vector<int32_t> counts;   // [B, Hq, nQ], empty without an index
  std::vector<int32_t> columns;  // [B, Hq, nQ, capacity]
  int32_t capacity = 0;
  double kept_pairs = 0.0;  // (query, key) pairs that the index and the masks leave
  double visible_pairs = 0.0;  // pairs that the masks alone leave
};

BenchInputs make_inputs(const BenchCase& bench_case);

// Where a call's tensors live: host or device memory, laid out as in BenchInputs.
struct BenchPointers {
  void *q = nullptr, *k = nullptr, *v = nullptr, *out = nullptr;
  float* lse = nullptr;
  int32_t *counts = nullptr, *columns = nullptr;
  int64_t* counters = nullptr;
};

AttendProblem make_problem(const BenchCase& bench_case, const BenchInputs& inputs,
                           const BenchPointers& pointers);

}  // namespace attnsieve::bench
