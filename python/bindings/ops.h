// The ops behind the schemas of library.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace attnsieve::binding {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& counts,
    const std::optional<Tensor>& columns, int64_t block_q, int64_t block_k,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
    const std::optional<Tensor>& sink, std::optional<double> threshold,
    const std::optional<Tensor>& threshold_per_head, int64_t skip_block, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right);

std::tuple<Tensor, Tensor> decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
    const std::optional<Tensor>& indices, const std::optional<Tensor>& counts,
    int64_t index_page_size, bool physical, const std::optional<Tensor>& dense_begin,
    int64_t recent, const std::optional<Tensor>& sink, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, double softmax_scale, bool causal, int64_t num_splits);

std::tuple<Tensor, Tensor, Tensor> threshold_decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
    const std::optional<Tensor>& sink, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, std::optional<double> threshold,
    const std::optional<Tensor>& threshold_per_head, int64_t skip_block, int64_t num_splits,
    double softmax_scale, bool causal);

Tensor proxy_scores(const Tensor& q, const Tensor& keys, const std::optional<Tensor>& key_scale,
                    const std::optional<Tensor>& projection,
                    const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
                    int64_t element, int64_t row_reduce, bool softmax, int64_t head_reduce,
                    int64_t num_out_heads, const std::optional<Tensor>& head_weights,
                    int64_t page_reduce, int64_t page_size, int64_t skip_first, int64_t skip_last,
                    bool causal, double score_scale);

void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const std::optional<Tensor>& block_table, const std::optional<Tensor>& seq_lens,
               const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& k_scale,
               const std::optional<Tensor>& v_scale, const std::optional<Tensor>& bounds,
               int64_t bounds_page_size, const std::optional<Tensor>& projection,
               const std::optional<Tensor>& proxy);

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses);

std::tuple<Tensor, Tensor> select_blocks(const Tensor& scores, int64_t seqlen_q, int64_t seqlen_k,
                                         int64_t block_q, int64_t block_k,
                                         std::optional<int64_t> topk,
                                         std::optional<double> fraction,
                                         std::optional<double> top_p, int64_t min_blocks,
                                         int64_t sink_blocks, int64_t local_blocks, bool diagonal,
                                         bool causal, int64_t window_left, int64_t window_right);

std::tuple<Tensor, Tensor> select_marked(const Tensor& bits,
                                         const std::optional<Tensor>& cu_seqlens_q,
                                         const std::optional<Tensor>& cu_seqlens_k,
                                         int64_t seqlen_q, int64_t seqlen_k, int64_t block_q,
                                         int64_t block_k, std::optional<int64_t> capacity,
                                         int64_t sink_blocks, int64_t local_blocks, bool diagonal,
                                         bool causal, int64_t window_left, int64_t window_right);

std::tuple<Tensor, Tensor> select_topk(const Tensor& scores, const std::optional<Tensor>& seq_lens,
                                       int64_t k, int64_t page_size, int64_t sink, int64_t recent,
                                       bool causal, const std::optional<Tensor>& block_table,
                                       int64_t table_page_size, int64_t num_pages);

std::tuple<Tensor, Tensor, Tensor> select_threshold(
    const Tensor& scores, const std::optional<Tensor>& seq_lens, std::optional<double> threshold,
    const std::optional<Tensor>& threshold_per_head, int64_t capacity, int64_t page_size,
    int64_t sink, int64_t recent, bool causal, const std::optional<Tensor>& block_table,
    int64_t table_page_size, int64_t num_pages);

std::tuple<Tensor, Tensor, Tensor> quantize_blocks(const Tensor& x,
                                                   const std::optional<Tensor>& cu_seqlens,
                                                   int64_t bits, int64_t scale_rows,
                                                   int64_t block_rows, bool smooth,
                                                   const std::optional<Tensor>& smoothed);

Tensor fetch_tokens(const Tensor& indices, const Tensor& counts, const Tensor& k, const Tensor& v,
                    const Tensor& slots, const Tensor& k_slots, const Tensor& v_slots,
                    const std::optional<Tensor>& first_new, const std::optional<Tensor>& moved);

Tensor estimate_block_scores(const Tensor& q_codes, const Tensor& q_scales, int64_t q_scale_rows,
                             int64_t q_block_rows, const Tensor& k_codes, const Tensor& k_scales,
                             int64_t k_scale_rows, int64_t k_block_rows,
                             const std::optional<Tensor>& threshold,
                             const std::optional<Tensor>& cu_seqlens_q,
                             const std::optional<Tensor>& cu_seqlens_k, int64_t seqlen_q,
                             int64_t seqlen_k, int64_t block_q, int64_t block_k, int64_t row_stride,
                             int64_t key_pool, bool sum, bool bits, double softmax_scale,
                             bool causal, int64_t window_left, int64_t window_right);

}  // namespace attnsieve::binding
