#include "cuda/common/launch.cuh"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm80/append_kv/kernel.cuh"

namespace attnsieve::sm80 {

template <class Element>
void launch_append_kv(const AppendKvArguments& a, void* stream) {
  const auto run = a.problem.code == Code::kNone
                       ? launch<append_kv_kernel<Element, false>, AppendKvArguments>
                       : launch<append_kv_kernel<Element, true>, AppendKvArguments>;
  run("append_kv", a.plan.items, kAppendThreads, 0, stream, a);
}

template void launch_append_kv<float>(const AppendKvArguments&, void*);
template void launch_append_kv<__half>(const AppendKvArguments&, void*);
template void launch_append_kv<__nv_bfloat16>(const AppendKvArguments&, void*);

std::vector<KernelEntry> append_kv_entries() {
  const auto entry = [](const char* name, auto* kernel) {
    return KernelEntry{name, reinterpret_cast<const void*>(kernel), kAppendThreads, 0};
  };
  return {entry("float32", &append_kv_kernel<float, false>),
          entry("float16", &append_kv_kernel<__half, false>),
          entry("bfloat16", &append_kv_kernel<__nv_bfloat16, false>),
          entry("float32 to float8", &append_kv_kernel<float, true>),
          entry("float16 to float8", &append_kv_kernel<__half, true>),
          entry("bfloat16 to float8", &append_kv_kernel<__nv_bfloat16, true>)};
}

}  // namespace attnsieve::sm80
