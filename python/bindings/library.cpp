// Every schema of the library, registered through the libtorch stable ABI.
#include <torch/csrc/stable/library.h>

#include "python/bindings/ops.h"

STABLE_TORCH_LIBRARY(attnsieve, m) {
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor? counts, Tensor? columns, int block_q, "
      "int block_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, "
      "Tensor? seq_lens, Tensor? sink, float? threshold, Tensor? threshold_per_head, "
      "int skip_block, float softmax_scale, bool causal, int window_left, int window_right) "
      "-> (Tensor out, Tensor lse, Tensor counters)");
  m.def(
      "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, Tensor? seq_lens, "
      "Tensor? indices, Tensor? counts, int index_page_size, bool physical, "
      "Tensor? dense_begin, int recent, Tensor? sink, Tensor? k_scale, Tensor? v_scale, "
      "float softmax_scale, bool causal, int num_splits) -> (Tensor out, Tensor lse)");
  m.def(
      "threshold_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, "
      "Tensor? seq_lens, Tensor? sink, Tensor? k_scale, Tensor? v_scale, float? threshold, "
      "Tensor? threshold_per_head, int skip_block, int num_splits, float softmax_scale, "
      "bool causal) -> (Tensor out, Tensor lse, Tensor counters)");
  m.def(
      "proxy_scores(Tensor q, Tensor keys, Tensor? key_scale, Tensor? projection, Tensor? "
      "block_table, "
      "Tensor? seq_lens, int element, int row_reduce, bool softmax, int head_reduce, "
      "int num_out_heads, Tensor? head_weights, int page_reduce, int page_size, int skip_first, "
      "int skip_last, bool causal, float score_scale) -> Tensor scores");
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? block_table, "
      "Tensor? seq_lens, Tensor? cu_seqlens, Tensor? k_scale, Tensor? v_scale, "
      "Tensor(c!)? bounds, int bounds_page_size, Tensor? projection, Tensor(d!)? proxy) -> ()");
  m.def("merge_states(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)");
  m.def(
      "select_blocks(Tensor scores, int seqlen_q, int seqlen_k, int block_q, int block_k, int? "
      "topk, "
      "float? fraction, float? top_p, int min_blocks, int sink_blocks, int local_blocks, bool "
      "diagonal, "
      "bool causal, int window_left, int window_right) -> (Tensor counts, Tensor columns)");
  m.def(
      "select_marked(Tensor bits, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int seqlen_q, "
      "int seqlen_k, int block_q, int block_k, int? capacity, int sink_blocks, int local_blocks, "
      "bool diagonal, bool causal, int window_left, int window_right) "
      "-> (Tensor counts, Tensor columns)");
  m.def(
      "select_topk(Tensor scores, Tensor? seq_lens, int k, int page_size, int sink, int recent, "
      "bool causal, Tensor? block_table, int table_page_size, int num_pages) "
      "-> (Tensor indices, Tensor counts)");
  m.def(
      "select_threshold(Tensor scores, Tensor? seq_lens, float? threshold, "
      "Tensor? threshold_per_head, int capacity, int page_size, int sink, int recent, "
      "bool causal, Tensor? block_table, int table_page_size, int num_pages) "
      "-> (Tensor indices, Tensor counts, Tensor passed)");
  m.def(
      "quantize_blocks(Tensor x, Tensor? cu_seqlens, int bits, int scale_rows, int block_rows, "
      "bool smooth, Tensor(a!)? smoothed=None) -> (Tensor codes, Tensor scales, Tensor mean)");
  m.def(
      "fetch_tokens(Tensor indices, Tensor counts, Tensor k, Tensor v, Tensor(a!) slots, "
      "Tensor(b!) k_slots, Tensor(c!) v_slots, Tensor? first_new, Tensor(d!)? moved) "
      "-> Tensor positions");
  m.def(
      "estimate_block_scores(Tensor q_codes, Tensor q_scales, int q_scale_rows, int q_block_rows, "
      "Tensor k_codes, Tensor k_scales, int k_scale_rows, int k_block_rows, Tensor? threshold, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int seqlen_q, int seqlen_k, int block_q, "
      "int block_k, int row_stride, int key_pool, bool sum, bool bits, float softmax_scale, "
      "bool causal, int window_left, int window_right) -> Tensor scores");
}

STABLE_TORCH_LIBRARY_IMPL(attnsieve, CPU, m) {
  m.impl("attend", TORCH_BOX(&attnsieve::binding::attend));
  m.impl("decode", TORCH_BOX(&attnsieve::binding::decode));
  m.impl("threshold_decode", TORCH_BOX(&attnsieve::binding::threshold_decode));
  m.impl("proxy_scores", TORCH_BOX(&attnsieve::binding::proxy_scores));
  m.impl("append_kv", TORCH_BOX(&attnsieve::binding::append_kv));
  m.impl("merge_states", TORCH_BOX(&attnsieve::binding::merge_states));
  m.impl("select_blocks", TORCH_BOX(&attnsieve::binding::select_blocks));
  m.impl("select_marked", TORCH_BOX(&attnsieve::binding::select_marked));
  m.impl("select_topk", TORCH_BOX(&attnsieve::binding::select_topk));
  m.impl("select_threshold", TORCH_BOX(&attnsieve::binding::select_threshold));
  m.impl("quantize_blocks", TORCH_BOX(&attnsieve::binding::quantize_blocks));
  m.impl("fetch_tokens", TORCH_BOX(&attnsieve::binding::fetch_tokens));
  m.impl("estimate_block_scores", TORCH_BOX(&attnsieve::binding::estimate_block_scores));
}

STABLE_TORCH_LIBRARY_IMPL(attnsieve, CUDA, m) {
  m.impl("attend", TORCH_BOX(&attnsieve::binding::attend));
  m.impl("decode", TORCH_BOX(&attnsieve::binding::decode));
  m.impl("threshold_decode", TORCH_BOX(&attnsieve::binding::threshold_decode));
  m.impl("proxy_scores", TORCH_BOX(&attnsieve::binding::proxy_scores));
  m.impl("append_kv", TORCH_BOX(&attnsieve::binding::append_kv));
  m.impl("merge_states", TORCH_BOX(&attnsieve::binding::merge_states));
  m.impl("select_blocks", TORCH_BOX(&attnsieve::binding::select_blocks));
  m.impl("select_marked", TORCH_BOX(&attnsieve::binding::select_marked));
  m.impl("select_topk", TORCH_BOX(&attnsieve::binding::select_topk));
  m.impl("select_threshold", TORCH_BOX(&attnsieve::binding::select_threshold));
  m.impl("quantize_blocks", TORCH_BOX(&attnsieve::binding::quantize_blocks));
  m.impl("fetch_tokens", TORCH_BOX(&attnsieve::binding::fetch_tokens));
  m.impl("estimate_block_scores", TORCH_BOX(&attnsieve::binding::estimate_block_scores));
}
