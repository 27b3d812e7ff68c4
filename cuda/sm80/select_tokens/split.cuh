// Computes        As kernel.cuh, for long lists that are too few to fill the GPU.
// Roles           `parts` CTAs share a list, each an equal run of the words of its ranked
//                 candidates. select_tokens_digit_kernel runs once a digit: each CTA counts its
//                 part, the one that ends last chooses the bin of the cut. Where the bin of the
//                 first digit is small its orders are collected with the second, and the last CTA
//                 finds the cut from them: the third launch then returns at once.
//                 select_tokens_write_kernel marks and writes; the CTAs of a list take their parts
//                 in the order in which they start, and each waits for the counts of those before
//                 it, which have started.
// Shared memory   As kernel.cuh.
// Workspace       A SplitState a list and the counts of every part, zeroed before; orders in the
//                 bin of the cut.
// Invariants      As kernel.cuh. A part has at most as many words as a CTA has threads.
#pragma once

#include "cuda/sm80/select_tokens/write.cuh"

namespace attnsieve::sm80 {

inline constexpr int kSplitThreads = 512;

struct SplitState {
  uint32_t histogram[kScoreBins];
  uint32_t arrived;    // CTAs that have counted, over all digits
  uint32_t passing;    // candidates above the threshold
  uint32_t list_size;  // orders in the list
  uint32_t next_part;
  CutState search;  // by the last CTA of a digit
};

struct SplitArguments {
  SelectTokensArguments lists;
  SplitState* states;  // a list each
  uint32_t* counts;    // [lists, parts]: of a part's marks, plus 1; 0 until they are known
  uint32_t* orders;    // [lists, kListCapacity]
  uint32_t parts;
  int digit;
};

// The part of a list that a CTA works on.
class SplitList {
 public:
  using Counter = DigitCounter<kSplitThreads>;

  __device__ explicit SplitList(const SplitArguments& arguments)
      : arguments_(arguments),
        list_(arguments.lists, blockIdx.x / arguments.parts),
        state_(arguments.states[list_.flat]) {}

 protected:
  // The search as far as earlier launches came.
  __device__ CutSearch load_search(bool first_digit) const {
    CutSearch search(list_);
    if (!search.found && !first_digit) static_cast<CutState&>(search) = state_.search;
    return search;
  }

  __device__ uint32_t words_of_part() const {
    const uint32_t last =
        (static_cast<uint32_t>(list_.candidates.end) + kWarpThreads - 1) / kWarpThreads;
    return (last - first_word() + arguments_.parts - 1) / arguments_.parts;
  }

  __device__ uint32_t first_word() const {
    return static_cast<uint32_t>(list_.candidates.begin) / kWarpThreads;
  }

  const SplitArguments& arguments_;
  const ScoreList list_;
  SplitState& state_;
};

class SplitDigit : public SplitList {
 public:
  struct SharedStorage {
    Counter::SharedStorage counter;
    uint32_t list_begin;
    bool last;
  };

  __device__ SplitDigit(const SplitArguments& arguments, SharedStorage& smem)
      : SplitList(arguments), smem_(smem), counter_(smem.counter) {}

  __device__ void run() {
    const int digit = arguments_.digit;
    CutSearch search = load_search(digit == 0);
    if (search.found) return;
    counter_.clear();
    count_part(search, digit);
    __syncthreads();
    const bool listed = Counter::collects(search, digit);
    add_to_list_of_all(listed);
    if (!arrives_last(digit)) return;

    for (int bin = threadIdx.x; bin < kScoreBins; bin += kSplitThreads) {
      smem_.counter.histogram[bin] = __ldcg(&state_.histogram[bin]);
      state_.histogram[bin] = 0;
    }
    if (digit == 0 && list_.has_threshold()) search.start(list_, __ldcg(&state_.passing));
    if (!search.found) {
      const uint32_t size = search.bucket;
      counter_.choose(search, digit);
      if (listed && !search.found) finish(search, size);
    }
    if (threadIdx.x == 0) state_.search = search;
  }

 private:
  __device__ void count_part(const CutSearch& search, int digit) {
    const uint32_t words = words_of_part();
    const uint32_t first = first_word() + blockIdx.x % arguments_.parts * words;
    const uint32_t begin = max(static_cast<uint32_t>(list_.candidates.begin), first * kWarpThreads);
    const uint32_t end =
        min(static_cast<uint32_t>(list_.candidates.end), (first + words) * kWarpThreads);
    counter_.count(list_, begin, end, search, digit);
  }

  __device__ void add_to_list_of_all(bool listed) {
    const Counter::SharedStorage& own = smem_.counter;
    for (int bin = threadIdx.x; bin < kScoreBins; bin += kSplitThreads) {
      if (own.histogram[bin] > 0) atomicAdd(&state_.histogram[bin], own.histogram[bin]);
    }
    if (threadIdx.x == 0) {
      if (own.passing > 0) atomicAdd(&state_.passing, own.passing);
      if (listed) smem_.list_begin = atomicAdd(&state_.list_size, own.list_size);
    }
    if (!listed) return;
    __syncthreads();
    uint32_t* const orders = orders_of_list() + smem_.list_begin;
    for (uint32_t i = threadIdx.x; i < own.list_size; i += kSplitThreads) orders[i] = own.list[i];
  }

  // Whether all other CTAs of the list have counted; their counts are then visible.
  __device__ bool arrives_last(int digit) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t all = arguments_.parts * static_cast<uint32_t>(digit + 1);
      smem_.last = atomicAdd(&state_.arrived, 1u) == all - 1;
    }
    __syncthreads();
    __threadfence();
    return smem_.last;
  }

  // Finds the cut from the list of all `size` orders with the prefix that this digit began with.
  __device__ void finish(CutSearch& search, uint32_t size) {
    const uint32_t* const orders = orders_of_list();
    for (uint32_t i = threadIdx.x; i < size; i += kSplitThreads) {
      smem_.counter.list[i] = __ldcg(orders + i);
    }
    __syncthreads();
    counter_.count_list(size, search, kScoreDigits - 1);
    counter_.choose(search, kScoreDigits - 1);
  }

  __device__ uint32_t* orders_of_list() const {
    return arguments_.orders + list_.flat * Counter::kListCapacity;
  }

  SharedStorage& smem_;
  Counter counter_;
};

class SplitWriter : public SplitList {
 public:
  using Scan = Counter::Scan;
  struct SharedStorage {
    Scan::TempStorage scan;
    uint32_t part;
    uint32_t above_before;
    uint32_t equal_before;
  };

  __device__ SplitWriter(const SplitArguments& arguments, SharedStorage& smem)
      : SplitList(arguments), smem_(smem) {}

  __device__ void run() {
    const CutSearch search = load_search(false);
    if (must_mark(list_, search)) write_part(search.cut);
    const uint32_t share = blockIdx.x % arguments_.parts;
    write_rest(list_, search, share * kSplitThreads + threadIdx.x,
               arguments_.parts * kSplitThreads);
  }

 private:
  __device__ void write_part(const ScoreCut& cut) {
    constexpr uint32_t kWarps = kSplitThreads / kWarpThreads;
    if (threadIdx.x == 0) {
      smem_.part = atomicAdd(&state_.next_part, 1u);
      smem_.above_before = 0;
      smem_.equal_before = 0;
    }
    __syncthreads();
    const uint32_t part = smem_.part;
    const uint32_t words = words_of_part();
    const uint32_t words_of_warp = (words + kWarps - 1) / kWarps;
    const uint32_t in_part = min(threadIdx.x / kWarpThreads * words_of_warp, words);
    const uint32_t own = first_word() + part * words + in_part;
    const WordMarks marks = mark_words(list_, cut, own, min(words_of_warp, words - in_part));
    uint32_t before;
    uint32_t total;
    Scan(smem_.scan).ExclusiveSum(marks.counts(), before, total);
    add_parts_before(part, total);
    write_words(list_, cut, own, marks, smem_.above_before + above_of(before),
                smem_.equal_before + equal_of(before));
  }

  // Shows the counts of this part to those behind it, and adds up those before it.
  __device__ void add_parts_before(uint32_t part, uint32_t total) {
    uint32_t* const counts = arguments_.counts + list_.flat * arguments_.parts;
    if (threadIdx.x == 0) atomicExch(&counts[part], total + 1);
    uint32_t above = 0;
    uint32_t equal = 0;
    for (uint32_t other = threadIdx.x; other < part; other += kSplitThreads) {
      uint32_t known = 0;
      while (known == 0) known = *const_cast<const volatile uint32_t*>(&counts[other]);
      above += above_of(known - 1);
      equal += equal_of(known - 1);
    }
    if (above > 0) atomicAdd(&smem_.above_before, above);
    if (equal > 0) atomicAdd(&smem_.equal_before, equal);
    __syncthreads();
  }

  SharedStorage& smem_;
};

__global__ void __launch_bounds__(kSplitThreads)
    select_tokens_digit_kernel(const __grid_constant__ SplitArguments arguments) {
  __shared__ SplitDigit::SharedStorage smem;
  SplitDigit(arguments, smem).run();
}

__global__ void __launch_bounds__(kSplitThreads)
    select_tokens_write_kernel(const __grid_constant__ SplitArguments arguments) {
  __shared__ SplitWriter::SharedStorage smem;
  SplitWriter(arguments, smem).run();
}

}  // namespace attnsieve::sm80
