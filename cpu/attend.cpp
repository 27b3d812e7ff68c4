// cpu::attend: checks the problem, cuts it into groups of 64 query rows, deals them to threads.
#include "attend.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <string>
#include <vector>

#include "attend_group.h"
#include "attnsieve/capability.h"
#include "attnsieve/launch.h"

namespace attnsieve::cpu {
namespace {

bool is_block_q(int32_t size) { return size == 64 || size == 128; }
bool is_block_k(int32_t size) { return size == 16 || size == 32 || is_block_q(size); }

void check_paged(const AttendProblem& problem) {
  const PagedKv& paged = problem.paged;
  if (paged.page_size <= 0 || paged.page_size % 16 != 0) {
    throw Unsupported("page_size " + std::to_string(paged.page_size) +
                      "; supported: multiples of 16");
  }
  if (paged.seq_lens == nullptr || problem.varlen.cu_seqlens_k != nullptr || paged.max_pages < 0 ||
      paged.num_pages < 0 || problem.seqlen_k != paged.capacity()) {
    throw InvalidArgument(
        "attend: paged K and V need seq_lens, no cu_seqlens_k, and seqlen_k = max_pages * "
        "page_size");
  }
}

void check(const AttendProblem& problem) {
  require_supported("attend", Backend::kCpu, problem.dtype, problem.head_dim);
  if (problem.batch < 0 || problem.num_heads < 0 || problem.seqlen_q < 0 || problem.seqlen_k < 0) {
    throw InvalidArgument("attend: sizes must not be negative");
  }
  if (problem.num_kv_heads <= 0 || problem.num_heads % problem.num_kv_heads != 0) {
    throw InvalidArgument("attend: num_heads (" + std::to_string(problem.num_heads) +
                          ") must be a multiple of num_kv_heads (" +
                          std::to_string(problem.num_kv_heads) + ")");
  }
  if (!is_block_q(problem.threshold.skip_block)) {
    throw Unsupported("skip_block " + std::to_string(problem.threshold.skip_block) +
                      "; supported: 64, 128");
  }
  if (problem.is_paged()) check_paged(problem);
  if (!problem.is_indexed()) return;
  if (!is_block_q(problem.index.block_q) || !is_block_k(problem.index.block_k)) {
    throw Unsupported("block_q x block_k " + std::to_string(problem.index.block_q) + " x " +
                      std::to_string(problem.index.block_k) +
                      "; supported: 64 or 128 x 16, 32, 64 or 128");
  }
  if (problem.index.heads_per_list <= 0 || problem.index.capacity < 0) {
    throw InvalidArgument("attend: index has heads_per_list " +
                          std::to_string(problem.index.heads_per_list) + " and capacity " +
                          std::to_string(problem.index.capacity));
  }
}

// One sequence (varlen) or batch entry and the first of its work items.
struct Sequence {
  int64_t batch;
  int64_t q_start, seqlen_q;
  int64_t k_start, seqlen_k;
  int64_t first_item;

  int64_t groups() const { return (seqlen_q + kGroupRows - 1) / kGroupRows; }
};

struct TokenRange {
  int64_t begin, length;
};

TokenRange tokens_of(const char* name, const int32_t* cu_seqlens, int64_t b, int64_t total) {
  const int64_t begin = cu_seqlens[b];
  const int64_t end = cu_seqlens[b + 1];
  if (begin < 0 || end < begin || end > total) {
    throw InvalidArgument("attend: " + std::string(name) +
                          " must be ascending and end within the tokens; entry " +
                          std::to_string(b) + " is not");
  }
  return {begin, end - begin};
}

std::vector<Sequence> sequences_of(const AttendProblem& problem) {
  std::vector<Sequence> sequences;
  sequences.reserve(problem.batch);
  const Varlen& varlen = problem.varlen;
  for (int64_t b = 0; b < problem.batch; ++b) {
    TokenRange q{0, problem.seqlen_q};
    TokenRange k{0, problem.seqlen_k};
    if (varlen.cu_seqlens_q) q = tokens_of("cu_seqlens_q", varlen.cu_seqlens_q, b, q.length);
    if (varlen.cu_seqlens_k) k = tokens_of("cu_seqlens_k", varlen.cu_seqlens_k, b, k.length);
    if (problem.is_paged()) k.length = std::clamp<int64_t>(problem.paged.seq_lens[b], 0, k.length);
    sequences.push_back({b, q.begin, q.length, k.begin, k.length, 0});
  }
  return sequences;
}

// Numbers the work items (sequence, head, group). Items are taken in this order, so the expensive
// ones come first: long sequences, and within one the last group, which sees the most keys under a
// causal mask.
int64_t number_items(std::vector<Sequence>& sequences, int64_t num_heads) {
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const Sequence& a, const Sequence& b) { return a.seqlen_k > b.seqlen_k; });
  int64_t items = 0;
  for (Sequence& sequence : sequences) {
    sequence.first_item = items;
    items += sequence.groups() * num_heads;
  }
  return items;
}

Group group_of(const std::vector<Sequence>& sequences, int64_t item) {
  const auto after =
      std::upper_bound(sequences.begin(), sequences.end(), item,
                       [](int64_t i, const Sequence& s) { return i < s.first_item; });
  const Sequence& sequence = *(after - 1);
  const int64_t local = item - sequence.first_item;
  Group group;
  group.batch = sequence.batch;
  group.head = local / sequence.groups();
  group.row_begin = (sequence.groups() - 1 - local % sequence.groups()) * kGroupRows;
  group.rows = static_cast<int>(std::min<int64_t>(kGroupRows, sequence.seqlen_q - group.row_begin));
  group.q_start = sequence.q_start;
  group.k_start = sequence.k_start;
  group.seqlen_q = sequence.seqlen_q;
  group.seqlen_k = sequence.seqlen_k;
  return group;
}

}  // namespace

void attend(const AttendProblem& problem, const ParallelFor& parallel_for, const Kernels& kernels) {
  check(problem);
  int64_t* counters = problem.threshold.counters;
  if (counters) std::fill_n(counters, problem.batch * problem.num_heads * 2, int64_t{0});
  std::vector<Sequence> sequences = sequences_of(problem);
  const int64_t items = number_items(sequences, problem.num_heads);
  if (items == 0) return;

  std::vector<TileCounts> counts(counters ? items : 0);
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  // Threads draw items from a shared counter instead of taking their [begin, end): lists and masks
  // make items uneven in ways a static split cannot know. A result depends on its item alone.
  parallel_for(items, [&](int64_t, int64_t) {
    int64_t item = next.fetch_add(1, std::memory_order_relaxed);
    if (item >= items) return;
    GroupScratch scratch;
    if (!scratch.allocate(problem)) {
      out_of_memory = true;
      return;
    }
    for (; item < items; item = next.fetch_add(1, std::memory_order_relaxed)) {
      const TileCounts group_counts =
          attend_group(problem, kernels, group_of(sequences, item), scratch);
      if (counters) counts[item] = group_counts;
    }
  });
  if (out_of_memory) throw std::bad_alloc();

  for (size_t item = 0; item < counts.size(); ++item) {
    const Group group = group_of(sequences, static_cast<int64_t>(item));
    int64_t* pair = counters + (group.batch * problem.num_heads + group.head) * 2;
    pair[0] += counts[item].skipped;
    pair[1] += counts[item].total;
  }
}

void attend(const AttendProblem& problem, const ParallelFor& parallel_for) {
  attend(problem, parallel_for, kernels());
}

}  // namespace attnsieve::cpu
