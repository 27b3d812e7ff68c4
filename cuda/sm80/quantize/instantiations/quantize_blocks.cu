#include "cuda/common/launch.cuh"
#include "cuda/sm80/quantize/kernel.cuh"

namespace attnsieve::sm80 {
namespace {

template <class Element, bool kFirst>
void sum_rows(const SumRowsArguments& a, void* stream) {
  const QuantizeProblem& p = a.problem;
  const int64_t slots = packed_chunks(p.batch, p.total_rows(), a.unit * kSumRows);
  const int threads = kSumLanes * static_cast<int>(p.head_dim) / kThreadColumns;
  launch<sum_rows_kernel<Element, kFirst>>("quantize_blocks", p.num_heads * slots, threads, 0,
                                           stream, a);
}

// Levels of sums, in turns in the two halves of the workspace.
template <class Element>
void launch_mean(const QuantizeProblem& problem, void* stream) {
  auto* const workspace = static_cast<float*>(problem.workspace);
  SumRowsArguments a;
  a.problem = problem;
  float* halves[2] = {workspace, workspace + level_size(problem, kSumRows)};
  for (int level = 0;; ++level) {
    const bool last = a.unit * kSumRows >= problem.seqlen;
    a.sums = last ? nullptr : halves[level % 2];
    if (level == 0) {
      sum_rows<Element, true>(a, stream);
    } else {
      sum_rows<float, false>(a, stream);
    }
    if (last) return;
    a.source = a.sums;
    a.unit *= kSumRows;
  }
}

}  // namespace

template <class Element>
void launch_quantize_blocks(const QuantizeProblem& problem, void* stream) {
  if (problem.mean != nullptr) launch_mean<Element>(problem, stream);
  if (problem.cu_seqlens != nullptr) {  // some scales belong to no row
    const size_t bytes = problem.num_heads * problem.num_scales() * sizeof(float);
    check_cuda(cudaMemsetAsync(problem.scales, 0, bytes, static_cast<cudaStream_t>(stream)),
               "quantize_blocks");
  }
  const int64_t slots = packed_chunks(problem.batch, problem.total_rows(), kQuantizeRows);
  launch<quantize_blocks_kernel<Element>>("quantize_blocks", problem.num_heads * slots,
                                          kQuantizeThreads, 0, stream, problem);
}

template void launch_quantize_blocks<float>(const QuantizeProblem&, void*);
template void launch_quantize_blocks<__half>(const QuantizeProblem&, void*);
template void launch_quantize_blocks<__nv_bfloat16>(const QuantizeProblem&, void*);

std::vector<KernelEntry> quantize_blocks_entries() {
  const auto entry = [](const char* name, auto* kernel, int threads) {
    return KernelEntry{name, reinterpret_cast<const void*>(kernel), threads, 0};
  };
  constexpr int kSumThreads = kSumLanes * kMaxRowThreads;
  return {entry("float32", &quantize_blocks_kernel<float>, kQuantizeThreads),
          entry("float16", &quantize_blocks_kernel<__half>, kQuantizeThreads),
          entry("bfloat16", &quantize_blocks_kernel<__nv_bfloat16>, kQuantizeThreads),
          entry("sums of float32", &sum_rows_kernel<float, true>, kSumThreads),
          entry("sums of float16", &sum_rows_kernel<__half, true>, kSumThreads),
          entry("sums of bfloat16", &sum_rows_kernel<__nv_bfloat16, true>, kSumThreads),
          entry("sums of sums", &sum_rows_kernel<float, false>, kSumThreads)};
}

}  // namespace attnsieve::sm80
