#include "bench_case.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "attnsieve/visibility.h"
#include "kernels.h"

namespace attnsieve::bench {
namespace {

// SplitMix64: small, seedable, the same numbers on every platform.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }

  int64_t below(int64_t limit) {
    return static_cast<int64_t>(next() % static_cast<uint64_t>(limit));
  }

  // Nearly normal, mean 0 and variance 1: the centred sum of four 16-bit uniforms.
  float normal() {
    constexpr double kSqrt3 = 1.7320508075688772;
    constexpr double kUniform = 65536.0;
    const uint64_t bits = next();
    const uint64_t sum =
        (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    return static_cast<float>((static_cast<double>(sum) / kUniform - 2.0) * kSqrt3);
  }

 private:
  uint64_t state_;
};

std::vector<uint8_t> random_tensor(int64_t elements, DType dtype, uint64_t seed) {
  constexpr int64_t kChunk = 1 << 16;
  Random random(seed);
  const int64_t size = cpu::element_size(dtype);
  std::vector<uint8_t> storage(static_cast<size_t>(elements * size));
  std::vector<float> values(kChunk);
  for (int64_t begin = 0; begin < elements; begin += kChunk) {
    const int64_t count = std::min(kChunk, elements - begin);
    for (int64_t i = 0; i < count; ++i) values[i] = random.normal();
    cpu::kernels().narrow(values.data(), dtype, count, storage.data() + begin * size);
  }
  return storage;
}

// `kept` of the ids 0 .. limit - 1, ascending, every subset equally likely (Knuth's algorithm S).
// With `forced`, the first and the last id are among them.
void sample_ids(Random& random, int64_t limit, int64_t kept, bool forced, int32_t* ids) {
  int64_t begin = 0, end = limit, wanted = kept;
  if (forced) {
    *ids++ = 0;
    ++begin;
    --wanted;
    if (wanted > 0) {
      --end;
      --wanted;
    }
  }
  for (int64_t id = begin; id < end && wanted > 0; ++id) {
    if (random.below(end - id) < wanted) {
      *ids++ = static_cast<int32_t>(id);
      --wanted;
    }
  }
  if (end < limit) *ids = static_cast<int32_t>(limit - 1);
}

// Pairs of the query rows [row_begin, row_end) and the keys [key_begin, key_end) that the mask
// leaves.
double pairs_of(const BenchCase& c, int64_t row_begin, int64_t row_end, int64_t key_begin,
                int64_t key_end) {
  const Mask mask = c.mask();
  const auto end_of = [&](int64_t row) {
    return visible_keys(mask, row, row + 1, c.seqlen_q, c.seqlen_k).end;
  };
  const int64_t rows = row_end - row_begin;
  if (rows <= 0) return 0.0;
  if (end_of(row_begin) >= key_end) return static_cast<double>(rows) * (key_end - key_begin);
  double pairs = 0.0;
  for (int64_t row = row_begin; row < row_end; ++row)
    pairs += static_cast<double>(max64(0, min64(end_of(row), key_end) - key_begin));
  return pairs;
}

void make_lists(const BenchCase& c, BenchInputs& inputs) {
  constexpr int64_t kFewestBlocks = 2;
  const int64_t num_rows = c.num_q_blocks();
  const auto visible_blocks = [&](int64_t row) {
    const int64_t row_end = std::min((row + 1) * c.block_q, c.seqlen_q);
    const KeyRange keys = visible_keys(c.mask(), row * c.block_q, row_end, c.seqlen_q, c.seqlen_k);
    return std::max<int64_t>(0, (keys.end + c.block_k - 1) / c.block_k);
  };
  const auto budget = [&](int64_t visible) {
    const auto share = static_cast<int64_t>(static_cast<double>(visible) * c.density);
    return std::min(visible, std::max(kFewestBlocks, share));
  };
  for (int64_t row = 0; row < num_rows; ++row) {
    inputs.capacity = std::max(inputs.capacity, static_cast<int32_t>(budget(visible_blocks(row))));
  }
  const int64_t lists = c.batch * c.num_heads * num_rows;
  inputs.counts.assign(lists, 0);
  inputs.columns.assign(lists * inputs.capacity, -1);
  Random random(4);
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t row = list % num_rows;
    const int64_t visible = visible_blocks(row);
    const int64_t kept = budget(visible);
    int32_t* ids = inputs.columns.data() + list * inputs.capacity;
    inputs.counts[list] = static_cast<int32_t>(kept);
    if (kept > 0) sample_ids(random, visible, kept, c.causal, ids);
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t key_begin = static_cast<int64_t>(ids[i]) * c.block_k;
      inputs.kept_pairs += pairs_of(c, row * c.block_q, std::min((row + 1) * c.block_q, c.seqlen_q),
                                    key_begin, std::min(key_begin + c.block_k, c.seqlen_k));
    }
  }
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

HeadTensor contiguous(void* data, int64_t heads, int64_t rows, int64_t head_dim) {
  return {data, heads * rows * head_dim, rows * head_dim, head_dim};
}

}  // namespace

Mask BenchCase::mask() const { return {causal, kUnbounded, kUnbounded}; }

std::string BenchCase::name() const {
  const std::string sizes = " d" + std::to_string(head_dim) + " L" + std::to_string(seqlen_k);
  std::string text;
  if (indexed) {
    text = "sparse" + sizes + " h" + std::to_string(num_heads) + " block" + std::to_string(block_q);
    if (block_q != block_k) text += "x" + std::to_string(block_k);
    text += " density" + number(density) + (density == 1.0 ? ".0" : "");
    if (causal) text += " causal1";
  } else {
    text = "dense" + sizes + " causal" + (causal ? "1" : "0");
  }
  if (seqlen_q != seqlen_k) text += " Sq" + std::to_string(seqlen_q);
  if (num_heads != num_kv_heads) text += " kv" + std::to_string(num_kv_heads);
  if (threshold) text += " threshold" + number(*threshold);
  return text;
}

std::string BenchCase::shape() const {
  return "[" + std::to_string(batch) + ", " + std::to_string(num_heads) + ", " +
         std::to_string(seqlen_q) + ", " + std::to_string(head_dim) + "]";
}

BenchInputs make_inputs(const BenchCase& c) {
  BenchInputs inputs;
  const int64_t q_elements = c.batch * c.num_heads * c.seqlen_q * c.head_dim;
  const int64_t k_elements = c.batch * c.num_kv_heads * c.seqlen_k * c.head_dim;
  inputs.q = random_tensor(q_elements, c.dtype, 1);
  inputs.k = random_tensor(k_elements, c.dtype, 2);
  inputs.v = random_tensor(k_elements, c.dtype, 3);
  inputs.visible_pairs =
      static_cast<double>(c.batch * c.num_heads) * pairs_of(c, 0, c.seqlen_q, 0, c.seqlen_k);
  inputs.kept_pairs = inputs.visible_pairs;
  if (c.indexed) {
    inputs.kept_pairs = 0.0;
    make_lists(c, inputs);
  }
  return inputs;
}

AttendProblem make_problem(const BenchCase& c, const BenchInputs& inputs,
                           const BenchPointers& pointers) {
  AttendProblem problem;
  problem.q = contiguous(pointers.q, c.num_heads, c.seqlen_q, c.head_dim);
  problem.k = contiguous(pointers.k, c.num_kv_heads, c.seqlen_k, c.head_dim);
  problem.v = contiguous(pointers.v, c.num_kv_heads, c.seqlen_k, c.head_dim);
  problem.out = contiguous(pointers.out, c.num_heads, c.seqlen_q, c.head_dim);
  problem.lse = {pointers.lse, c.num_heads * c.seqlen_q, c.seqlen_q, 1};
  problem.batch = c.batch;
  problem.num_heads = c.num_heads;
  problem.num_kv_heads = c.num_kv_heads;
  problem.seqlen_q = c.seqlen_q;
  problem.seqlen_k = c.seqlen_k;
  problem.head_dim = c.head_dim;
  problem.dtype = c.dtype;
  problem.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  problem.mask = c.mask();
  if (c.indexed) {
    const int64_t num_rows = c.num_q_blocks();
    BlockIndexView& index = problem.index;
    index.counts = pointers.counts;
    index.columns = pointers.columns;
    index.counts_stride_head = num_rows;
    index.counts_stride_batch = c.num_heads * num_rows;
    index.columns_stride_row = inputs.capacity;
    index.columns_stride_head = num_rows * inputs.capacity;
    index.columns_stride_batch = c.num_heads * num_rows * inputs.capacity;
    index.num_rows = static_cast<int32_t>(num_rows);
    index.capacity = inputs.capacity;
    index.block_q = c.block_q;
    index.block_k = c.block_k;
  }
  if (c.threshold) {
    problem.threshold.enabled = true;
    problem.threshold.value = *c.threshold;
    problem.threshold.counters = pointers.counters;
  }
  return problem;
}

}  // namespace attnsieve::bench
