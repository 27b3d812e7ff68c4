#include "cuda/dispatch/kernel_table.h"

#include "cuda/dispatch/instantiations.h"
#include "cuda/sm80/fetch_tokens/arguments.h"
#include "cuda/sm80/quantize/arguments.h"

namespace attnsieve::cuda {
namespace {

void append(std::vector<KernelEntry>& table, const std::string& prefix,
            const std::vector<KernelEntry>& entries) {
  for (const KernelEntry& entry : entries) {
    table.push_back(entry);
    table.back().name = prefix + " " + entry.name;
  }
}

template <class Element, class Stored, int kHeadDim>
void append_decode(std::vector<KernelEntry>& table, const std::string& what) {
  append(table, "decode sm_80 " + what, sm80::decode_entries<Element, Stored, kHeadDim>());
  append(table, "threshold_decode sm_80 " + what,
         sm80::threshold_decode_entries<Element, Stored, kHeadDim>());
#if ATTNSIEVE_SM90
  append(table, "decode sm_90 " + what + " list",
         sm90::decode_lists_entries<Element, Stored, kHeadDim>());
#endif
}

template <int kHeadDim>
void append_decode(std::vector<KernelEntry>& table) {
  using cute::bfloat16_t;
  using cute::float_e4m3_t;
  using cute::half_t;
  const std::string dim = " hd" + std::to_string(kHeadDim);
  append_decode<bfloat16_t, bfloat16_t, kHeadDim>(table, "bfloat16" + dim);
  append_decode<bfloat16_t, float_e4m3_t, kHeadDim>(table, "bfloat16" + dim + " float8 cache");
  append_decode<half_t, half_t, kHeadDim>(table, "float16" + dim);
  append_decode<half_t, float_e4m3_t, kHeadDim>(table, "float16" + dim + " float8 cache");
}

template <class Element, int kHeadDim>
void append_sm90(std::vector<KernelEntry>& table, const std::string& prefix) {
  append(table, prefix + " dense", sm90::attend_entries<Element, kHeadDim, false, false>());
  append(table, prefix + " list", sm90::attend_entries<Element, kHeadDim, false, true>());
  if constexpr (kHeadDim > 64) {
    append(table, prefix + " dense pieces", sm90::attend_entries<Element, kHeadDim, true, false>());
    append(table, prefix + " list pieces", sm90::attend_entries<Element, kHeadDim, true, true>());
  }
}

}  // namespace

std::vector<KernelEntry> kernel_table() {
  std::vector<KernelEntry> table;
#if ATTNSIEVE_HEAD_DIM_64
  append(table, "attend sm_80 bfloat16 hd64", sm80::attend_entries<cute::bfloat16_t, 64>());
  append(table, "attend sm_80 float16 hd64", sm80::attend_entries<cute::half_t, 64>());
  append_decode<64>(table);
#endif
#if ATTNSIEVE_HEAD_DIM_128
  append(table, "attend sm_80 bfloat16 hd128", sm80::attend_entries<cute::bfloat16_t, 128>());
  append(table, "attend sm_80 float16 hd128", sm80::attend_entries<cute::half_t, 128>());
  append_decode<128>(table);
#endif
#if ATTNSIEVE_SM90 && ATTNSIEVE_HEAD_DIM_64
  append_sm90<cute::bfloat16_t, 64>(table, "attend sm_90 bfloat16 hd64");
  append_sm90<cute::half_t, 64>(table, "attend sm_90 float16 hd64");
#endif
#if ATTNSIEVE_SM90 && ATTNSIEVE_HEAD_DIM_96
  append_sm90<cute::bfloat16_t, 96>(table, "attend sm_90 bfloat16 hd96");
  append_sm90<cute::half_t, 96>(table, "attend sm_90 float16 hd96");
#endif
#if ATTNSIEVE_SM90 && ATTNSIEVE_HEAD_DIM_128
  append_sm90<cute::bfloat16_t, 128>(table, "attend sm_90 bfloat16 hd128");
  append_sm90<cute::half_t, 128>(table, "attend sm_90 float16 hd128");
#endif
#if ATTNSIEVE_SM90 && ATTNSIEVE_HEAD_DIM_256
  append_sm90<cute::bfloat16_t, 256>(table, "attend sm_90 bfloat16 hd256");
  append_sm90<cute::half_t, 256>(table, "attend sm_90 float16 hd256");
#endif
  append(table, "merge_states sm_80", sm80::merge_states_entries());
  append(table, "select_blocks sm_80", sm80::select_blocks_entries());
  append(table, "select_tokens sm_80", sm80::select_tokens_entries());
#if ATTNSIEVE_SM90
  append(table, "select_tokens sm_90", sm90::select_tokens_entries());
#endif
  append(table, "proxy_scores sm_80 float32", sm80::proxy_scores_entries<float>());
  append(table, "proxy_scores sm_80 float16", sm80::proxy_scores_entries<__half>());
  append(table, "proxy_scores sm_80 bfloat16", sm80::proxy_scores_entries<__nv_bfloat16>());
  append(table, "append_kv sm_80", sm80::append_kv_entries());
  append(table, "fetch_tokens sm_80", sm80::fetch_tokens_entries());
  append(table, "quantize_blocks sm_80", sm80::quantize_blocks_entries());
#if ATTNSIEVE_HEAD_DIM_64
  append(table, "estimate_block_scores sm_80", sm80::estimate_block_scores_entries<64>());
#endif
#if ATTNSIEVE_HEAD_DIM_96
  append(table, "estimate_block_scores sm_80", sm80::estimate_block_scores_entries<96>());
#endif
#if ATTNSIEVE_HEAD_DIM_128
  append(table, "estimate_block_scores sm_80", sm80::estimate_block_scores_entries<128>());
#endif
#if ATTNSIEVE_HEAD_DIM_256
  append(table, "estimate_block_scores sm_80", sm80::estimate_block_scores_entries<256>());
#endif
  return table;
}

}  // namespace attnsieve::cuda
