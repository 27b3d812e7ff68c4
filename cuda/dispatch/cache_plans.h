// Choices the host makes before proxy_scores and append_kv, as pure functions of the problem:
// testable without a GPU.
#pragma once

#include "attnsieve/problem.h"

namespace attnsieve::sm80 {

inline constexpr int kScoreTileUnits = 32;  // of a warp's tile in the kernel for every problem
inline constexpr int kScoreTileVectors = 16;
inline constexpr int kSoftmaxChunkUnits = 1024;

inline constexpr int kMaxStreamHeads = 8;  // an MMA's columns
inline constexpr int kMaxStreamDim = 128;
inline constexpr int kMaxProjectedDim = 64;  // of queries that are projected there
inline constexpr int kStreamWarps = 8;
inline constexpr int kStreamCtasPerSm = 2;

// How proxy_scores cuts a problem into items, of a warp each or, streamed, of a CTA. Results do not
// depend on it.
struct ProxyScoresPlan {
  // One query row, the heads of a key head scored side by side and reduced all or not at all: the
  // kernel that keeps its queries in registers.
  bool streamed = false;
  int heads_per_key = 0;
  int heads_per_out = 0;
  int out_rows = 0;  // of the scores
  int items = 0;

  // Not streamed: an item is a group of outputs for a block of columns.
  int merged_rows = 0;  // query rows that become one
  int lanes_per_column = 0;
  int turns = 0;  // of those lanes, to reach every unit of a column
  int group_rows = 0;  // output rows of an item
  int group_heads = 0;  // query heads of an item
  int groups = 0;  // of a sequence
  int columns = 0;
  int column_blocks = 0;  // of 32 / lanes_per_column columns

  // Softmax: an item is an output row, up to kScoreTileVectors heads of a key head, and a chunk.
  int chunks = 0;
  int total_heads = 0;
  int total_items = 0;

  // Streamed: an item is a key head and a block of `steps` steps for each warp of the CTA.
  bool projects = false;  // queries, beside its first keys
  int stream_dim = 0;  // 32, 64 or 128: head_dim fits
  int step_units = 0;
  int steps = 0;
  int stream_blocks = 0;  // of a sequence
};

// Throws InvalidArgument where units or items exceed what 32 bits count.
ProxyScoresPlan plan_proxy_scores(const ProxyScoresProblem& problem, int num_sms);

// 16-byte pieces of a key row that four lanes hold side by side, for rows of stream_dim.
constexpr int stream_pieces(int stream_dim) { return stream_dim / 32; }

// M-tiles of 16 units of a step: 16 loads of 16 bytes are in flight in every lane.
constexpr int stream_tiles(int stream_dim, bool bounds) {
  return 8 / (stream_pieces(stream_dim) * (bounds ? 2 : 1));
}

// How append_kv cuts the positions of a cache: a CTA takes a segment, whole pages of the bounds, of
// one sequence and KV head.
struct AppendKvPlan {
  int segment_keys = 0;
  // Segments are numbered over the batch: those of sequence b begin at segments * b, packed at
  // cu_seqlens[b] / segment_keys + 2 * b.
  int segments = 0;  // of a sequence; 0: packed
  int64_t items = 0;
};

AppendKvPlan plan_append_kv(const AppendKvProblem& problem);

}  // namespace attnsieve::sm80
