// The problem structs of the quantised-estimate family: integer codes of rows, and the layout of
// their scales, which every backend shares.
#pragma once

#include <string>

#include "attnsieve/problem.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"

namespace attnsieve {

// Which rows of a sequence share a scale. The last two are SALE's: what one lane of a warp holds of
// an MMA's accumulators, so that integer maxima of a lane have one scale.
enum class ScaleRows : int32_t {
  kBlock,       // `block_rows` that follow each other; 1: every row its own
  kQueryPairs,  // rows r and r + 8 of every 16
  kKeyQuads,    // of every 32 rows those with the same row % 8 / 2
};

// Scales lie in chunks of `rows` rows with `scales` scales each; a chunk never leaves its sequence.
struct ScaleLayout {
  int32_t rows;
  int32_t scales;

  // Of a row of its chunk.
  ATTNSIEVE_HD int32_t scale_of(ScaleRows scale_rows, int32_t row) const {
    if (scale_rows == ScaleRows::kQueryPairs) return row % 8;
    if (scale_rows == ScaleRows::kKeyQuads) return row % 8 / 2;
    return 0;
  }
};

ATTNSIEVE_HD ScaleLayout scale_layout(ScaleRows scale_rows, int32_t block_rows) {
  if (scale_rows == ScaleRows::kQueryPairs) return {16, 8};
  if (scale_rows == ScaleRows::kKeyQuads) return {32, 4};
  return {block_rows, 1};
}

// Where sequence `b`, whose rows begin at `begin` of all rows, has its first chunk of `rows` rows,
// in a packed tensor. Known without the other sequences; a chunk may stay unused between two.
ATTNSIEVE_HD int64_t first_chunk(int64_t b, int64_t begin, int64_t rows) {
  return begin / rows + b;
}
ATTNSIEVE_HD int64_t packed_chunks(int64_t batch, int64_t total_rows, int64_t rows) {
  return total_rows / rows + batch;
}

// The mean of a column is the sum of its finite numbers, in float32, over the number of rows. To be
// the same everywhere, the sum has an order: of kSumRows rows at a time, by kSumLanes lanes of which
// lane i adds rows i, i + kSumLanes ... one after the other before the lanes are added in order;
// then the same over these sums, until one is left.
inline constexpr int kSumRows = 128;
inline constexpr int kSumLanes = 16;

// A scale would not be a normal number, nor its reciprocal one, for magnitudes below: all codes 0.
inline constexpr float kSmallestMagnitude = 0x1p-119f;

constexpr int32_t largest_code(int32_t bits) { return (1 << (bits - 1)) - 1; }

// codes = round(y * (largest / magnitude)), scales = magnitude / largest for y = x - mean and the
// greatest |y| of the rows that share the scale; in float32, to nearest even. Rows that are all
// below kSmallestMagnitude: codes and scale 0. Rows with a number that is not finite: codes 0 and
// scale NaN.
struct QuantizeProblem {
  HeadTensor x;
  DType dtype = DType::kFloat32;
  const int32_t* cu_seqlens = nullptr;  // [B + 1]: packed sequences; nullptr: batched
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t seqlen = 0;  // rows of a sequence; packed: of all
  int64_t head_dim = 0;
  int32_t bits = 8;  // 8; 4, where byte i of every 16 holds code i of 32 above code i + 16
  ScaleRows scale_rows = ScaleRows::kBlock;
  int32_t block_rows = 1;  // a power of two up to 128
  HeadTensor codes;        // strides in bytes; like x, batched or packed
  // [B, H, chunks * scales]; packed: [H, packed_chunks() * scales], unused ones 0
  float* scales = nullptr;
  float* mean = nullptr;      // [B, H, D] contiguous; nullptr: nothing is subtracted
  HeadTensor smoothed;        // y in x's dtype, like x; data nullptr: not asked for
  void* workspace = nullptr;  // CUDA: quantize_workspace_bytes()

  ATTNSIEVE_HD int64_t total_rows() const {
    return cu_seqlens != nullptr ? seqlen : batch * seqlen;
  }
  ATTNSIEVE_HD int64_t num_scales() const {  // of a head (and a sequence, where batched)
    const ScaleLayout layout = scale_layout(scale_rows, block_rows);
    const int64_t chunks = cu_seqlens != nullptr ? packed_chunks(batch, seqlen, layout.rows)
                                                 : (seqlen + layout.rows - 1) / layout.rows;
    return chunks * layout.scales;
  }
};

// Rows of sequence `b` of the problem, of those of its tensor; within the tensor whatever cu_seqlens
// says.
ATTNSIEVE_HD KeyRange sequence_rows(const QuantizeProblem& problem, int64_t b) {
  if (problem.cu_seqlens == nullptr) return {0, problem.seqlen};
  const int64_t begin = min64(max64(problem.cu_seqlens[b], 0), problem.seqlen);
  const int64_t end = min64(problem.cu_seqlens[b + 1], problem.seqlen);
  return {begin, max64(begin, end)};
}

inline constexpr int kMaxScaleRows = 128;  // of a chunk

// What a 4-bit code in the upper half of a byte is multiplied with: exact, as scales are 0 or at least
// kSmallestMagnitude / 7.
inline constexpr float kNibbleScale = 0.0625f;

// Codes and their scales, as quantize_blocks leaves them.
struct CodedRows {
  HeadTensor codes;  // strides in bytes; [B, H, S, D], or packed [T, H, D]
  const float* scales = nullptr;  // [B, H, num_scales] contiguous; packed: [H, num_scales]
  int64_t num_scales = 0;
  int32_t bits = 8;
  ScaleRows scale_rows = ScaleRows::kBlock;
  int32_t block_rows = 1;

  ATTNSIEVE_HD ScaleLayout layout() const { return scale_layout(scale_rows, block_rows); }
};

enum class EstimateReduce : int32_t { kMax, kSum };

// For q-block a and KV block b of a head, over the sampled rows i of a and the keys j of b that i
// sees: the maximum of  dot(i, j) * ((q_scale(i) * softmax_scale) * k_scale(j)) - threshold(i),  or
// the sum of exponentials of it. dot is of integers and exact, the rest float32 in the order written:
// every backend finds the same bits of a maximum. Codes of k with 4 bits, as the upper halves of
// bytes, stand for 16 times as much there, and k_scale for kNibbleScale as much. Rows 0, row_stride ... of a sequence are sampled.
// Where no sampled row sees a key the maximum is -inf and the sum 0; where a scale of a visible pair
// is NaN both are NaN, which is the greatest.
// With key_pool n > 1 a row of k stands for n keys, and is seen where one of them is.
struct EstimateProblem {
  CodedRows q, k;
  RowTensor threshold;  // [B, Hq, Sq], packed [Tq, Hq]; data nullptr: 0
  Varlen varlen;  // packed sequences; not with key_pool
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 1;
  int64_t total_q = 0;  // packed: rows of q's codes
  int64_t total_k = 0;
  int64_t seqlen_q = 0;  // packed: of the longest sequence, for which there is room
  int64_t seqlen_k = 0;  // keys; k has num_keys() rows
  int64_t head_dim = 0;
  float softmax_scale = 0.0f;
  Mask mask;
  int32_t block_q = 64;  // 64, 128
  int32_t block_k = 64;  // rows of k: 16, 32, 64, 128
  int32_t row_stride = 1;  // 1, 2, 4, 8
  int32_t key_pool = 1;  // 1, 2, 4, 8
  EstimateReduce reduce = EstimateReduce::kMax;
  // One of them: [B, Hq, nQ, nK] contiguous; or of maxima a bit a block, set where the number is
  // above 0 or NaN: [B, Hq, nQ, ceil(nK / 32)], bit b % 32 of word b / 32.
  float* scores = nullptr;
  uint32_t* bits = nullptr;

  ATTNSIEVE_HD bool is_packed() const { return varlen.cu_seqlens_q != nullptr; }
  ATTNSIEVE_HD int64_t num_keys() const { return (seqlen_k + key_pool - 1) / key_pool; }
  ATTNSIEVE_HD int64_t num_q_blocks() const { return (seqlen_q + block_q - 1) / block_q; }
  ATTNSIEVE_HD int64_t num_k_blocks() const { return (num_keys() + block_k - 1) / block_k; }
};

// One sequence of an EstimateProblem, from its first row and head on.
struct EstimateSequence {
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t num_keys;  // rows of k
  int64_t first_key;  // of k's rows, in a packed tensor
  const char* q_codes;
  const char* k_codes;
  const float* q_scales;  // heads are q.num_scales apart
  const float* k_scales;
  int64_t num_k_scales;
  const float* threshold;  // nullptr: 0
};

ATTNSIEVE_HD KeyRange clamped_rows(const int32_t* cu_seqlens, int64_t b, int64_t total,
                                   int64_t most) {
  const int64_t begin = min64(max64(cu_seqlens[b], 0), total);
  const int64_t end = min64(min64(cu_seqlens[b + 1], total), begin + most);
  return {begin, max64(begin, end)};
}

ATTNSIEVE_HD EstimateSequence sequence_of(const EstimateProblem& p, int64_t b) {
  EstimateSequence s;
  const auto* q_codes = static_cast<const char*>(p.q.codes.data);
  const auto* k_codes = static_cast<const char*>(p.k.codes.data);
  const ScaleLayout q_layout = p.q.layout();
  const ScaleLayout k_layout = p.k.layout();
  s.threshold = p.threshold.data;
  if (!p.is_packed()) {
    s.seqlen_q = p.seqlen_q;
    s.seqlen_k = p.seqlen_k;
    s.num_keys = p.num_keys();
    s.first_key = 0;
    s.q_codes = q_codes + b * p.q.codes.stride_batch;
    s.k_codes = k_codes + b * p.k.codes.stride_batch;
    s.q_scales = p.q.scales + b * p.num_heads * p.q.num_scales;
    s.k_scales = p.k.scales + b * p.num_kv_heads * p.k.num_scales;
    if (s.threshold != nullptr) s.threshold += b * p.threshold.stride_batch;
  } else {
    const KeyRange rows = clamped_rows(p.varlen.cu_seqlens_q, b, p.total_q, p.seqlen_q);
    const KeyRange keys = clamped_rows(p.varlen.cu_seqlens_k, b, p.total_k, p.seqlen_k);
    s.seqlen_q = rows.end - rows.begin;
    s.seqlen_k = s.num_keys = keys.end - keys.begin;
    s.first_key = keys.begin;
    s.q_codes = q_codes + rows.begin * p.q.codes.stride_row;
    s.k_codes = k_codes + keys.begin * p.k.codes.stride_row;
    s.q_scales = p.q.scales + first_chunk(b, rows.begin, q_layout.rows) * q_layout.scales;
    s.k_scales = p.k.scales + first_chunk(b, keys.begin, k_layout.rows) * k_layout.scales;
    if (s.threshold != nullptr) s.threshold += rows.begin * p.threshold.stride_row;
  }
  s.num_k_scales = (s.num_keys + k_layout.rows - 1) / k_layout.rows * k_layout.scales;
  return s;
}

// Rows of k that at least one of the query rows [row_begin, row_end) sees; {0, 0} for none.
ATTNSIEVE_HD KeyRange estimated_keys(const EstimateProblem& p, const EstimateSequence& s,
                                     int64_t row_begin, int64_t row_end) {
  row_end = min64(row_end, s.seqlen_q);
  const KeyRange keys = visible_keys(p.mask, row_begin, row_end, s.seqlen_q, s.seqlen_k);
  if (keys.begin >= keys.end) return {0, 0};
  const int32_t shift = p.key_pool == 8 ? 3 : p.key_pool / 2;  // log2
  return {keys.begin >> shift, (keys.end + p.key_pool - 1) >> shift};
}

inline void check_quantize(const QuantizeProblem& problem) {
  const auto refuse = [](const std::string& text) {
    throw InvalidArgument("quantize_blocks: " + text);
  };
  if (problem.batch < 0 || problem.num_heads < 0 || problem.seqlen < 0)
    refuse("sizes must not be negative");
  if (problem.bits != 4 && problem.bits != 8)
    refuse("bits must be 4 or 8, got " + std::to_string(problem.bits));
  const int32_t rows = problem.block_rows;
  if (rows < 1 || rows > kMaxScaleRows || (rows & (rows - 1)) != 0)
    refuse("block_rows must be a power of two up to 128, got " + std::to_string(rows));
  if (problem.bits == 4 && problem.head_dim % 32 != 0)
    refuse("4 bits need a head_dim that is a multiple of 32, got " +
           std::to_string(problem.head_dim));
}

inline void check_estimate(const EstimateProblem& problem) {
  const auto refuse = [](const std::string& text) {
    throw InvalidArgument("estimate_block_scores: " + text);
  };
  if (problem.batch < 0 || problem.seqlen_q < 0 || problem.seqlen_k < 0)
    refuse("sizes must not be negative");
  if (problem.num_kv_heads <= 0 || problem.num_heads % problem.num_kv_heads != 0)
    refuse("num_heads must be a multiple of num_kv_heads");
  if (problem.block_q != 64 && problem.block_q != 128)
    refuse("block_q must be 64 or 128, got " + std::to_string(problem.block_q));
  if (problem.block_k != 16 && problem.block_k != 32 && problem.block_k != 64 &&
      problem.block_k != 128)
    refuse("block_k must be 16, 32, 64 or 128, got " + std::to_string(problem.block_k));
  const int32_t stride = problem.row_stride;
  if (stride != 1 && stride != 2 && stride != 4 && stride != 8)
    refuse("row_stride must be 1, 2, 4 or 8, got " + std::to_string(stride));
  const int32_t pool = problem.key_pool;
  if (pool != 1 && pool != 2 && pool != 4 && pool != 8)
    refuse("key_pool must be 1, 2, 4 or 8, got " + std::to_string(pool));
  if (pool != 1 && problem.is_packed()) refuse("key_pool must be 1 for packed sequences");
  if ((problem.varlen.cu_seqlens_q == nullptr) != (problem.varlen.cu_seqlens_k == nullptr))
    refuse("both cu_seqlens must be given, or neither");
  if (problem.reduce == EstimateReduce::kSum && problem.bits != nullptr)
    refuse("bits tell of maxima, not of sums");
  if (problem.k.scale_rows == ScaleRows::kQueryPairs ||
      (problem.k.scale_rows == ScaleRows::kBlock && problem.k.block_rows < 16))
    refuse("scales of k must belong to blocks of 16 rows or more, or to key_quads");
  const bool empty =
      problem.batch * problem.num_heads * problem.seqlen_q == 0 || problem.seqlen_k == 0;
  if (!empty && (problem.scores == nullptr) == (problem.bits == nullptr))
    refuse("either scores or bits must be given");
}

}  // namespace attnsieve
