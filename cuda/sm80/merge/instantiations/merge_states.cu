#include "cuda/common/launch.cuh"
#include "cuda/dispatch/instantiations.h"
#include "cuda/sm80/merge/kernel.cuh"

namespace attnsieve::sm80 {
namespace {

template <class Element>
void launch_one(const MergeProblem& problem, void* stream) {
  const int64_t items =
      problem.rows * (problem.head_dim * static_cast<int64_t>(sizeof(Element)) / 16);
  launch<merge_states_kernel<Element>>("merge_states", (items + kMergeThreads - 1) / kMergeThreads,
                                       kMergeThreads, 0, stream, problem);
}

template <class Element>
KernelEntry entry(const char* name) {
  return {name, reinterpret_cast<const void*>(merge_states_kernel<Element>), kMergeThreads, 0};
}

}  // namespace

void launch_merge_states(const MergeProblem& problem, void* stream) {
  switch (problem.dtype) {
    case DType::kFloat32: return launch_one<float>(problem, stream);
    case DType::kFloat16: return launch_one<__half>(problem, stream);
    case DType::kBFloat16: return launch_one<__nv_bfloat16>(problem, stream);
  }
}

std::vector<KernelEntry> merge_states_entries() {
  return {entry<float>("float32"), entry<__half>("float16"), entry<__nv_bfloat16>("bfloat16")};
}

}  // namespace attnsieve::sm80
