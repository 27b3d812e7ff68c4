// Host side of one element type.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm80/proxy_scores/softmax.cuh"
#include "cuda/sm80/proxy_scores/stream.cuh"

namespace attnsieve::sm80 {

inline constexpr int kProjectionThreads = 256;
inline constexpr const char* kProxyScores = "proxy_scores";

template <class Element, int kDim>
void launch_stream_scores(const ProxyScoresArguments& a, void* stream) {
  if (a.problem.element == ProxyElement::kBounds) {
    launch<stream_scores_kernel<Element, kDim, true>>(kProxyScores, a.plan.items, kStreamThreads, 0,
                                                      stream, a);
  } else {
    launch<stream_scores_kernel<Element, kDim, false>>(kProxyScores, a.plan.items, kStreamThreads,
                                                       0, stream, a);
  }
}

// Afterwards a.problem has what is scored for q.
template <class Element>
void launch_projection(ProxyScoresArguments* a, void* stream) {
  ProxyScoresProblem& p = a->problem;
  const int64_t vectors = p.num_heads / p.num_projections * p.num_rows;
  const int64_t chunks = (vectors + kProjectedVectors - 1) / kProjectedVectors;
  launch<project_queries_kernel<Element, kProjectionThreads>>(
      kProxyScores, p.batch * p.num_projections * chunks, kProjectionThreads, 0, stream, *a);
  p.q = {a->projected, p.num_heads * p.num_rows * p.head_dim, p.num_rows * p.head_dim, p.head_dim};
  p.projection.data = nullptr;
}

template <class Element>
void launch_proxy_scores(const ProxyScoresArguments& arguments, void* stream) {
  ProxyScoresArguments a = arguments;
  if (a.projected != nullptr) launch_projection<Element>(&a, stream);
  if constexpr (sizeof(Element) == 2) {
    if (a.plan.streamed) {
      switch (a.plan.stream_dim) {
        case 32: return launch_stream_scores<Element, 32>(a, stream);
        case 64: return launch_stream_scores<Element, 64>(a, stream);
        default: return launch_stream_scores<Element, 128>(a, stream);
      }
    }
  }
  const auto ctas = [](int64_t items) { return (items + kScoreWarps - 1) / kScoreWarps; };
  if (a.problem.softmax) {
    launch<softmax_chunks_kernel<Element>>(kProxyScores, ctas(a.plan.total_items), kScoreThreads, 0,
                                           stream, a);
    const int64_t lines = a.problem.batch * a.plan.out_rows * a.problem.num_heads;
    launch<softmax_totals_kernel<kScoreThreads>>(kProxyScores, ctas(lines), kScoreThreads, 0,
                                                 stream, a);
  }
  launch<proxy_scores_kernel<Element>>(kProxyScores, ctas(a.plan.items), kScoreThreads, 0, stream,
                                       a);
}

template <class Element>
std::vector<KernelEntry> proxy_scores_entries() {
  const auto entry = [](const char* name, auto* kernel, int threads) {
    return KernelEntry{name, reinterpret_cast<const void*>(kernel), threads, 0};
  };
  std::vector<KernelEntry> entries = {
      entry("every problem", &proxy_scores_kernel<Element>, kScoreThreads),
      entry("softmax of chunks", &softmax_chunks_kernel<Element>, kScoreThreads),
      entry("projection", &project_queries_kernel<Element, kProjectionThreads>,
            kProjectionThreads)};
  if constexpr (sizeof(Element) == 4) {
    entries.push_back(
        entry("softmax totals", &softmax_totals_kernel<kScoreThreads>, kScoreThreads));
  } else {
    const std::vector<KernelEntry> streams = {
        entry("dot 32", &stream_scores_kernel<Element, 32, false>, kStreamThreads),
        entry("dot 64", &stream_scores_kernel<Element, 64, false>, kStreamThreads),
        entry("dot 128", &stream_scores_kernel<Element, 128, false>, kStreamThreads),
        entry("bounds 32", &stream_scores_kernel<Element, 32, true>, kStreamThreads),
        entry("bounds 64", &stream_scores_kernel<Element, 64, true>, kStreamThreads),
        entry("bounds 128", &stream_scores_kernel<Element, 128, true>, kStreamThreads)};
    entries.insert(entries.end(), streams.begin(), streams.end());
  }
  return entries;
}

}  // namespace attnsieve::sm80
