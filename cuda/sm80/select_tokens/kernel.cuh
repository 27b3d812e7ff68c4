// Computes        counts[b, i, h], indices[b, i, h, :]: the candidates of a list of scores that are
//                 kept, ascending; passed[b, i, h].
// Roles           A CTA owns a list. Forced ranges lie at its ends. Among the candidates between
//                 them an exact radix descent finds the score of the last one kept; one more sweep
//                 marks what is above and at it, a word of 32 candidates a lane, and the prefix sums
//                 of the marks say where each entry goes.
// Shared memory   Histogram of a digit (8 KB), orders in the bin of the cut (16 KB).
// Invariants      Sums are integers and marks lie by position, so nothing depends on the order of
//                 atomics. Scores are read from memory in every sweep, three of them as a rule:
//                 caches serve the later ones.
// First try       sampled.cuh, which reads the scores once.
// Not handled     Lists that few CTAs should share: split.cuh.
#pragma once

#include "cuda/sm80/select_tokens/sampled.cuh"
#include "cuda/sm80/select_tokens/write.cuh"

namespace attnsieve::sm80 {

template <int kThreads>
class TokenSelector {
 public:
  using Counter = DigitCounter<kThreads>;
  using SharedStorage = typename Counter::SharedStorage;

  __device__ TokenSelector(const SelectTokensArguments& arguments, uint32_t list_of_all,
                           SharedStorage& smem)
      : list_(arguments, list_of_all), smem_(smem) {}

  __device__ void run() {
    const CutSearch search = find_cut();
    if (must_mark(list_, search)) write_marked(search);
    write_rest(list_, search, threadIdx.x, kThreads);
  }

 private:
  __device__ CutSearch find_cut() {
    const uint32_t begin = static_cast<uint32_t>(list_.candidates.begin);
    const uint32_t end = static_cast<uint32_t>(list_.candidates.end);
    CutSearch search(list_);
    if (search.found) return search;
    Counter counter(smem_);
    counter.clear();
    bool listed = false;
    for (int digit = 0; !search.found; ++digit) {
      if (listed) {
        counter.count_list(smem_.list_size, search, digit);
      } else {
        listed = Counter::collects(search, digit);
        counter.count(list_, begin, end, search, digit);
      }
      if (digit == 0 && list_.has_threshold()) {
        __syncthreads();
        search.start(list_, smem_.passing);
        if (search.found) break;
      }
      counter.choose(search, digit);
    }
    __syncthreads();
    return search;
  }

  __device__ void write_marked(const CutSearch& search) {
    constexpr uint32_t kWarps = kThreads / kWarpThreads;
    const uint32_t first = static_cast<uint32_t>(list_.candidates.begin) / kWarpThreads;
    const uint32_t last =
        (static_cast<uint32_t>(list_.candidates.end) + kWarpThreads - 1) / kWarpThreads;
    const uint32_t words = min((last - first + kWarps - 1) / kWarps, uint32_t{kWarpThreads});
    uint32_t above_before = 0;
    uint32_t equal_before = 0;
    for (uint32_t chunk = first; chunk < last; chunk += kWarps * words) {
      const uint32_t own = chunk + threadIdx.x / kWarpThreads * words;
      const WordMarks marks = mark_words(list_, search.cut, own, words);
      uint32_t before;
      uint32_t total;
      typename Counter::Scan(smem_.scan).ExclusiveSum(marks.counts(), before, total);
      write_words(list_, search.cut, own, marks, above_before + above_of(before),
                  equal_before + equal_of(before));
      above_before += above_of(total);
      equal_before += equal_of(total);
      __syncthreads();
    }
  }

  ScoreList list_;
  SharedStorage& smem_;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads < 1024 ? 2 : 1)
    select_tokens_kernel(const __grid_constant__ SelectTokensArguments arguments) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  if (arguments.sampled) {
    auto& smem = *reinterpret_cast<SampledStorage*>(shared_memory);
    if (SampledSelector<kThreads, OneCta>(arguments, smem).run()) return;
    __syncthreads();
  }
  using Selector = TokenSelector<kThreads>;
  auto& smem = *reinterpret_cast<typename Selector::SharedStorage*>(shared_memory);
  Selector(arguments, blockIdx.x, smem).run();
}

}  // namespace attnsieve::sm80
