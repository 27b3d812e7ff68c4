// Computes        As cuda/sm80/select_tokens/kernel.cuh, for lists that are too few to fill the GPU:
//                 in one launch and without a workspace.
// Roles           A cluster of kRanks CTAs owns a list, each an equal run of the words of its ranked
//                 candidates. All count a digit of their part; rank 0 holds the sums and chooses the
//                 bin of the cut, which the others then read. For the write every rank tells those
//                 above it how much it marked.
// Shared memory   As kernel.cuh, and the search and the marks that other ranks read.
// First try       cuda/sm80/select_tokens/sampled.cuh.
// Pipeline        Two cluster barriers a digit, one before the write, one before the end: no rank
//                 leaves while another may read its memory.
// Invariants      As kernel.cuh.
#pragma once

#include <cooperative_groups.h>

#include "cuda/sm80/select_tokens/kernel.cuh"

namespace attnsieve::sm90 {

namespace cg = cooperative_groups;
using sm80::CutSearch;
using sm80::ScoreCut;
using sm80::ScoreList;
using sm80::WordMarks;

template <int kThreads, int kRanks>
class ClusterSelector {
 public:
  using Counter = sm80::DigitCounter<kThreads>;
  struct SharedStorage {
    typename Counter::SharedStorage counter;
    sm80::CutState search;  // of rank 0: what all do next
    uint32_t above;  // marks of this rank's part
    uint32_t equal;
    uint32_t above_before;  // marks of the ranks before it
    uint32_t equal_before;
  };

  __device__ ClusterSelector(const sm80::SelectTokensArguments& arguments, SharedStorage& smem)
      : arguments_(arguments), smem_(smem), counter_(smem.counter) {}

  __device__ void run() {
    const CutSearch search = find_cut();
    // The list once more, not kept in registers meanwhile.
    const ScoreList list(arguments_, blockIdx.x / kRanks);
    if (sm80::must_mark(list, search)) write_marked(list, search.cut);
    sm80::write_rest(list, search, rank() * kThreads + threadIdx.x, kRanks * kThreads);
    cg::this_cluster().sync();
  }

 private:
  struct Words {
    uint32_t first;
    uint32_t last;  // behind it
  };

  __device__ static int rank() { return blockIdx.x % kRanks; }

  __device__ Words words_of_part(const ScoreList& list) const {
    const uint32_t first = static_cast<uint32_t>(list.candidates.begin) / kWarpThreads;
    const uint32_t last =
        (static_cast<uint32_t>(list.candidates.end) + kWarpThreads - 1) / kWarpThreads;
    const uint32_t share = (last - first + kRanks - 1) / kRanks;
    const uint32_t own = min(first + rank() * share, last);
    return {own, min(own + share, last)};
  }

  __device__ CutSearch find_cut() {
    const ScoreList list(arguments_, blockIdx.x / kRanks);
    CutSearch search(list);
    if (search.found) return search;
    const Words part = words_of_part(list);
    const uint32_t begin =
        max(static_cast<uint32_t>(list.candidates.begin), part.first * kWarpThreads);
    const uint32_t end = min(static_cast<uint32_t>(list.candidates.end), part.last * kWarpThreads);
    counter_.clear();
    cg::this_cluster().sync();  // rank 0 may be added to
    bool listed = false;
    for (int digit = 0; !search.found; ++digit) {
      if (listed) {
        counter_.count_list(smem_.counter.list_size, search, digit);
      } else {
        listed = Counter::collects(search, digit);
        counter_.count(list, begin, end, search, digit);
      }
      add_to_rank_0(digit == 0 && list.has_threshold());
      cg::this_cluster().sync();
      if (rank() == 0) {
        if (digit == 0 && list.has_threshold()) search.start(list, smem_.counter.passing);
        if (!search.found) counter_.choose(search, digit);
        if (threadIdx.x == 0) smem_.search = search;
      }
      cg::this_cluster().sync();
      if (rank() > 0) {
        static_cast<sm80::CutState&>(search) =
            *cg::this_cluster().map_shared_rank(&smem_.search, 0);
      }
    }
    __syncthreads();
    return search;
  }

  // Rank 0 counted into the sums; the other ranks add theirs, and begin the next digit with none.
  __device__ void add_to_rank_0(bool with_passing) {
    __syncthreads();
    if (rank() == 0) return;
    typename Counter::SharedStorage& own = smem_.counter;
    uint32_t* const sums = cg::this_cluster().map_shared_rank(own.histogram, 0);
    for (int bin = threadIdx.x; bin < sm80::kScoreBins; bin += kThreads) {
      if (own.histogram[bin] == 0) continue;
      atomicAdd(&sums[bin], own.histogram[bin]);
      own.histogram[bin] = 0;
    }
    if (with_passing && threadIdx.x == 0) {
      atomicAdd(cg::this_cluster().map_shared_rank(&own.passing, 0), own.passing);
    }
  }

  // The words are marked in chunks of at most 32 a warp. One chunk is marked once; where there are
  // more, once to count and once more to write.
  __device__ void write_marked(const ScoreList& list, const ScoreCut& cut) {
    constexpr uint32_t kWarps = kThreads / kWarpThreads;
    const Words part = words_of_part(list);
    const uint32_t words =
        min((part.last - part.first + kWarps - 1) / kWarps, uint32_t{kWarpThreads});
    const uint32_t stride = kWarps * words;
    const bool single = part.last - part.first <= stride;
    const uint32_t in_chunk = threadIdx.x / kWarpThreads * words;
    WordMarks marks;
    uint32_t before = 0;
    uint32_t total = 0;
    const auto mark = [&](uint32_t chunk) {
      const uint32_t own = chunk + in_chunk;
      marks = WordMarks();
      if (own < part.last) {
        marks = sm80::mark_words<2>(list, cut, own, min(words, part.last - own));
      }
      typename Counter::Scan(smem_.counter.scan).ExclusiveSum(marks.counts(), before, total);
      __syncthreads();
    };
    uint32_t above = 0;
    uint32_t equal = 0;
    for (uint32_t chunk = part.first; chunk < part.last; chunk += stride) {
      mark(chunk);
      above += sm80::above_of(total);
      equal += sm80::equal_of(total);
    }
    add_ranks_before(above, equal);
    uint32_t above_before = smem_.above_before;
    uint32_t equal_before = smem_.equal_before;
    for (uint32_t chunk = part.first; chunk < part.last; chunk += stride) {
      if (!single) mark(chunk);
      write_words(list, cut, chunk + in_chunk, marks, above_before + sm80::above_of(before),
                  equal_before + sm80::equal_of(before));
      above_before += sm80::above_of(total);
      equal_before += sm80::equal_of(total);
    }
  }

  __device__ void add_ranks_before(uint32_t above, uint32_t equal) {
    if (threadIdx.x == 0) {
      smem_.above = above;
      smem_.equal = equal;
    }
    cg::this_cluster().sync();
    if (threadIdx.x == 0) {
      uint32_t above_before = 0;
      uint32_t equal_before = 0;
#pragma unroll
      for (int other = 0; other < kRanks - 1; ++other) {
        if (other >= rank()) break;
        above_before += *cg::this_cluster().map_shared_rank(&smem_.above, other);
        equal_before += *cg::this_cluster().map_shared_rank(&smem_.equal, other);
      }
      smem_.above_before = above_before;
      smem_.equal_before = equal_before;
    }
    __syncthreads();
  }

  const sm80::SelectTokensArguments& arguments_;
  SharedStorage& smem_;
  Counter counter_;
};

// A cluster owns a list.
template <int kRanks>
struct ClusterOfCtas {
  static constexpr int kCount = kRanks;
  __device__ static int rank() { return static_cast<int>(blockIdx.x) % kRanks; }
  __device__ static uint32_t list() { return blockIdx.x / kRanks; }
  __device__ static void sync() { cg::this_cluster().sync(); }
  template <class T>
  __device__ static T* of_rank_0(T* pointer) {
    return cg::this_cluster().map_shared_rank(pointer, 0);
  }
};

template <int kThreads, int kRanks>
__global__ void __cluster_dims__(kRanks, 1, 1) __launch_bounds__(kThreads)
    select_tokens_kernel(const __grid_constant__ sm80::SelectTokensArguments arguments) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  using Ranks = ClusterOfCtas<kRanks>;
  if (arguments.sampled) {
    auto& smem = *reinterpret_cast<sm80::SampledStorage*>(shared_memory);
    const bool done = sm80::SampledSelector<kThreads, Ranks>(arguments, smem).run();
    // Others read what rank 0 has before they leave.
    if (!done || Ranks::rank() == 0) Ranks::sync();
    if (done) return;
  }
  using Selector = ClusterSelector<kThreads, kRanks>;
  auto& smem = *reinterpret_cast<typename Selector::SharedStorage*>(shared_memory);
  Selector(arguments, smem).run();
}

}  // namespace attnsieve::sm90
