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

}  // namespace attnsieve
