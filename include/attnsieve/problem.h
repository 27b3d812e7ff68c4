// The problem structs: everything a backend needs to know about one call, as plain data. CPU and
// CUDA backends take the same structs, so a host program or a test can build one without torch.
#pragma once

#include <cstdint>

#include "attnsieve/block_index.h"
#include "attnsieve/tensor_view.h"

namespace attnsieve {

inline constexpr int64_t kUnbounded = -1;  // window side without a limit

struct Mask {
  bool causal = false;  // query row i sees key j <= i + seqlen_k - seqlen_q (bottom-right)
  int64_t window_left = kUnbounded;  // j >= i + seqlen_k - seqlen_q - window_left
  int64_t window_right = kUnbounded;  // j <= i + seqlen_k - seqlen_q + window_right
};

// int32 [B + 1] on the problem's device; nullptr for a batched problem.
struct Varlen {
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
};

// K and V in pages of a cache [num_pages, page_size, Hkv, D]: page p of k is k.data + p *
// k.stride_batch. Key j of sequence b is row j % page_size of page block_table[b, j / page_size].
// A table entry outside [0, num_pages) is never followed: its keys count as masked.
struct PagedKv {
  const int32_t* block_table = nullptr;  // [B, max_pages]; nullptr: K and V are not paged
  const int32_t* seq_lens = nullptr;     // [B]: keys of each sequence, clamped to the capacity
  int64_t table_stride_batch = 0;
  int64_t num_pages = 0;
  int32_t page_size = 0;                 // a multiple of 16
  int32_t max_pages = 0;

  int64_t capacity() const { return static_cast<int64_t>(max_pages) * page_size; }
};

// Most query vectors (heads x rows) that decide together in threshold_decode: groups are of
// min(query heads of a KV head, kMaxDecodeGroup / rows) neighbouring heads, all rows of each.
inline constexpr int kMaxDecodeGroup = 16;

// Threshold skipping. Off when `enabled` is false; otherwise lambda is `per_head[b * stride_batch +
// h * stride_head]` or, where per_head is nullptr, `value`.
struct Threshold {
  bool enabled = false;
  float value = 0.0f;
  const float* per_head = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int32_t skip_block =
      128;  // keys per voted tile: 64 or 128. Also fixes the visiting order when disabled.
  int64_t* counters =
      nullptr;  // int64 [B, Hq, 2] (skipped, total), zeroed by the backend; may be nullptr
};

struct AttendProblem {
  HeadTensor q, k, v, out;
  RowTensor lse;  // data may be nullptr
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t seqlen_q = 0;  // varlen: all query tokens of the batch
  int64_t seqlen_k = 0;  // varlen: all key tokens of the batch; paged: keys a table row can hold
  int64_t head_dim = 0;
  DType dtype = DType::kFloat32;
  float softmax_scale = 0.0f;
  Mask mask;
  Varlen varlen;  // paged: cu_seqlens_k is nullptr
  PagedKv paged;
  BlockIndexView index;
  Threshold threshold;
  const float* sink = nullptr;  // float32 [Hq]: one more logit per row that has no value vector
  void* workspace = nullptr;  // CUDA: cuda::attend_workspace_bytes() of device memory, or none

  bool is_varlen() const { return varlen.cu_seqlens_q != nullptr; }
  bool is_paged() const { return paged.block_table != nullptr; }
  bool is_indexed() const { return index.counts != nullptr; }
  int64_t group_size() const { return num_heads / num_kv_heads; }
};

inline constexpr int kMaxDecodeRows = 8;
inline constexpr int kMaxDecodeSplits = 128;

// Attention of a few new query rows per sequence. Their own keys are in the cache: row i of Sq sees
// keys j <= i + length - Sq.
struct DecodeProblem {
  HeadTensor q, k, v, out;  // paged: as in PagedKv
  RowTensor lse;  // data may be nullptr
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t seqlen_q = 0;  // at most kMaxDecodeRows
  int64_t seqlen_k = 0;  // keys that the cache has room for, per sequence
  int64_t head_dim = 0;
  DType dtype = DType::kFloat32;
  float softmax_scale = 0.0f;
  bool causal = true;
  PagedKv paged;  // any page_size; seq_lens may stand alone, for a contiguous cache
  TokenIndexView index;
  // With an index: keys from min(dense_begin[b], length - recent) on are attended besides the list,
  // whose keys there are dropped. nullptr and 0: no such range.
  const int32_t* dense_begin = nullptr;  // [B]
  int64_t recent = 0;
  const float* sink = nullptr;  // float32 [Hq]
  // Of the caches: kNone, or kFloat8E4m3 with k = code * k_scale[kv head], v alike. kNone: nullptr.
  Code code = Code::kNone;
  const float* k_scale = nullptr;  // float32 [Hkv]
  const float* v_scale = nullptr;
  // CUDA: parts of at most ceil(keys / num_splits) keys that a list is cut into; 0: the library
  // chooses. The CPU computes a list in one piece.
  // threshold_decode: the number of visiting sequences, in [1, kMaxDecodeSplits] on every backend.
  int32_t num_splits = 0;
  // threshold_decode alone, which takes no index. lambda belongs to a query head.
  Threshold threshold;
  void* workspace = nullptr;  // CUDA: cuda::decode_workspace_bytes() of device memory
};

enum class ProxyElement : int32_t {
  kDot,  // q . k
  kReluDot,  // max(q . k, 0)
  kBounds,  // sum_i max(q_i * max_i, q_i * min_i): q . k is not above it for any key of the page
};

enum class Reduction : int32_t { kNone, kMax, kMean, kSum };

// A score for every unit of a cache: a key, or with kBounds a page of page_size keys. In this order:
// score_scale * element * head_weights; rows reduced; softmax over the units; query heads reduced
// to num_out_heads; keys reduced to pages. Candidates are the units [skip_first, n - skip_last) of
// the n that hold keys of the sequence, where a row sees them and their page exists. The others
// take part in nothing and score -inf. NaN passes every reduction.
struct ProxyScoresProblem {
  HeadTensor q;  // [B, Hq, R, dp], or with a projection [B, Hq, R, query_dim]
  // Scored are rows of q . projection, rounded to dtype: query head h has matrix
  // h / (num_heads / num_projections).
  HeadTensor projection;  // [B, num_projections, query_dim, dp]; data nullptr: none
  int64_t num_projections = 0;
  int64_t query_dim = 0;
  HeadTensor keys;  // rows of dp per (sequence, head, unit); paged: (page, head, row of the page)
  int64_t keys_stride_bound = 0;  // from the minima of a page to its maxima
  RowTensor key_scale;  // as keys, without dp; data nullptr: no scales
  int64_t key_scale_stride_bound = 0;
  RowTensor head_weights;  // [B, Hq, R]; data nullptr: 1
  float* scores = nullptr;  // [B, rows, num_out_heads, columns()] contiguous; rows 1 where reduced
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_key_heads = 0;  // query head h reads key head h / (num_heads / num_key_heads)
  int64_t num_out_heads = 0;
  int64_t num_rows = 0;
  int64_t units = 0;  // that the cache has room for, per sequence
  int64_t head_dim = 0;
  DType dtype = DType::kFloat32;  // of q, and of keys without a code
  Code key_code = Code::kNone;
  ProxyElement element = ProxyElement::kDot;
  Reduction row_reduce = Reduction::kNone;
  bool softmax = false;
  Reduction head_reduce = Reduction::kNone;
  Reduction page_reduce = Reduction::kNone;
  int64_t page_size = 1;  // keys of a page, with page_reduce or kBounds
  int64_t skip_first = 0;
  int64_t skip_last = 0;
  bool causal = false;  // row i sees keys j <= i + length - R, and the pages that hold one
  float score_scale = 1.0f;
  PagedKv pages;  // seq_lens count keys; page_size counts units: 1 with kBounds
  // CUDA: cuda::proxy_scores_workspace_bytes() of device memory, needed where they are not 0
  void* workspace = nullptr;

  constexpr int64_t unit_keys() const { return element == ProxyElement::kBounds ? page_size : 1; }
  constexpr int64_t units_per_column() const {
    return page_reduce == Reduction::kNone ? 1 : page_size;
  }
  constexpr int64_t columns() const {
    return (units + units_per_column() - 1) / units_per_column();
  }
};

// Writes new rows of K and V into a cache, and what is kept beside it. Row i of n goes to position
// seq_lens[b] - n + i; one that the cache has no place for is not written.
struct AppendKvProblem {
  HeadTensor k, v;  // [B, Hkv, Sq, D], or with cu_seqlens all rows of the batch
  HeadTensor k_cache, v_cache;  // [B, Hkv, capacity, D]; paged: as in PagedKv
  int64_t batch = 0;
  int64_t num_kv_heads = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;  // keys that the cache has room for, per sequence
  int64_t head_dim = 0;
  DType dtype = DType::kFloat32;
  Code code = Code::kNone;  // of the caches: kNone, or kFloat8E4m3 of x / scale
  const float* k_scale = nullptr;  // [Hkv]
  const float* v_scale = nullptr;
  const int32_t* cu_seqlens = nullptr;  // [B + 1]
  PagedKv pages;  // seq_lens: lengths after the append, never clamped
  // Minima and maxima, over its keys below the new length, of every page that received a row.
  HeadTensor bounds;  // [B, Hkv, pages, 2, D]; paged: a page each; data nullptr: none
  int64_t bounds_stride_bound = 0;
  DType bounds_dtype = DType::kFloat32;
  int64_t bounds_page_size = 1;  // keys of a page; paged: pages.page_size
  // proxy row = new key row . projection, for num_proxy_heads / num_kv_heads projections per head.
  HeadTensor projection;  // [Hp, D, proxy_dim]: stride_row between the rows of a matrix
  HeadTensor proxy;  // [B, Hp, capacity, proxy_dim]; paged: as in PagedKv; data nullptr: none
  DType projection_dtype = DType::kFloat32;
  DType proxy_dtype = DType::kFloat32;
  int64_t num_proxy_heads = 0;
  int64_t proxy_dim = 0;
};

// out[i] = sum_n softmax_n(lse[n, i]) * outs[n, i];  lse[i] = logsumexp_n lse[n, i]. Rows are
// flattened.
struct MergeProblem {
  const void* outs = nullptr;  // [N, rows, head_dim] contiguous
  const float* lses = nullptr;  // [N, rows] contiguous
  void* out = nullptr;  // [rows, head_dim] contiguous
  float* lse = nullptr;  // [rows] contiguous
  int64_t num_states = 0;
  int64_t rows = 0;
  int64_t head_dim = 0;
  DType dtype = DType::kFloat32;
};

enum class SelectRule : int32_t {
  kTopK,  // budget = `topk` blocks a row
  kFraction,  // budget = max(min_blocks, ceil(fraction * visible blocks of the row))
  kTopP,  // fewest blocks whose softmax mass over the row's visible blocks reaches top_p, at least
  // min_blocks
  kMarked,  // blocks whose bit of `marks` is set; `scores` are not read. Of a row that would keep
  // more than `capacity`, the sink blocks and of the others those of the greatest positions
};

// Rows of block scores -> BlockIndex. Row r of q-blocks sees the KV blocks that hold a key visible
// to any of its rows. Forced blocks rank before all others and are inside the budget; when there
// are more forced blocks than budget, all forced blocks are kept and nothing else.
struct SelectProblem {
  const float* scores = nullptr;  // [B, H, nQ, nK], last dimension contiguous
  int64_t scores_stride_batch = 0;
  int64_t scores_stride_head = 0;
  int64_t scores_stride_row = 0;
  // kMarked: [B, H, nQ, ceil(nK / 32)] contiguous; block b is bit b % 32 of word b / 32.
  const uint32_t* marks = nullptr;
  int32_t* counts = nullptr;  // [B, H, nQ] contiguous
  int32_t* columns = nullptr;  // [B, H, nQ, capacity] contiguous; tail filled with -1
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t seqlen_q = 0;  // packed: of the longest sequence
  int64_t seqlen_k = 0;
  Varlen varlen;  // kMarked: packed sequences
  int32_t block_q = 64;
  int32_t block_k = 64;
  int32_t capacity = 0;  // = nK unless the rule bounds it
  Mask mask;
  SelectRule rule = SelectRule::kTopK;
  int32_t topk = 0;
  double fraction = 0.0;
  double top_p = 0.0;
  int32_t min_blocks = 1;
  int32_t sink_blocks = 0;  // the first n blocks are forced (where visible)
  int32_t local_blocks =
      0;  // the n blocks before the row's diagonal blocks are forced (where visible)
  bool force_diagonal =
      false;  // blocks that hold the row's own positions are forced (where visible)

  int64_t num_q_blocks() const { return (seqlen_q + block_q - 1) / block_q; }
  int64_t num_k_blocks() const { return (seqlen_k + block_k - 1) / block_k; }
  int64_t num_mark_words() const { return (num_k_blocks() + 31) / 32; }
};

enum class TokenRule : int32_t {
  kTopK,  // the `capacity` best
  kThreshold,  // scores above a threshold; where more than `capacity` are, the best of them
};

// Lists of token or page scores -> TokenIndex. The candidates of a list are its first
// ceil(visible keys / page_size) scores; the first `sink` and the last `recent` of them are kept
// whatever their scores. Ranking: larger scores, then smaller positions; NaN below -inf.
struct TokenSelectProblem {
  const float* scores = nullptr;  // [B, Sq, H, columns], last dimension contiguous
  int64_t scores_stride_batch = 0;
  int64_t scores_stride_row = 0;
  int64_t scores_stride_head = 0;
  int32_t* indices = nullptr;  // [B, Sq, H, capacity] contiguous, ascending, tail filled with -1
  int32_t* counts = nullptr;  // [B, Sq, H] contiguous
  int32_t* passed = nullptr;  // like counts: entries before the cut to capacity; may be nullptr
  int64_t batch = 0;
  int64_t seqlen_q = 1;
  int64_t num_lists = 0;
  int64_t columns = 0;
  int32_t capacity = 0;
  int64_t page_size = 1;  // keys that a score stands for
  int64_t sink = 0;  // sink + recent <= capacity
  int64_t recent = 0;
  bool causal = false;  // row i sees seq_lens[b] - Sq + 1 + i keys, otherwise seq_lens[b]
  TokenRule rule = TokenRule::kTopK;
  Threshold threshold;  // value or per_head, without lambda's meaning: a plain limit on scores
  // seq_lens (nullptr: every score is a candidate), clamped to what the scores cover. With a
  // block_table tokens become slots page * pages.page_size + row, and pages, where page_size ==
  // pages.page_size, page ids; -1 where the table names no page.
  PagedKv pages;
  // CUDA: cuda::select_tokens_workspace_bytes() of device memory, or none
  void* workspace = nullptr;
};

}  // namespace attnsieve
