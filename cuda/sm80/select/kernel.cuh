// Computes        counts[b, h, r], columns[b, h, r, :]: the KV blocks that row r of block scores
//                 keeps, ascending.
// Roles           A CTA owns one row. Forced blocks are taken first; among the others an exact
//                 radix descent (four 8-bit digits) finds the smallest kept key, and ties at it go
//                 to the smaller index.
// Shared memory   256 bins of block counts (1 KB) and of fixed-point masses (2 KB).
// Invariants      Masses are integers (softmax weight x 2^32), so sums do not depend on the order
//                 of atomics and the CPU backend decides the same. Equal keys have equal masses.
// Not handled     Scores of other dtypes than float32.
#pragma once

#include "cuda/common/score_order.cuh"
#include "cuda/sm80/select/row.cuh"

namespace attnsieve::sm80 {

inline constexpr int kDigitBits = 8;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr double kMassOne = 4294967296.0;  // fixed point of a softmax weight of 1

// What a prefix of the ranking must reach.
struct Target {
  int count;
  unsigned long long mass;
  __device__ bool reached(int count_so_far, unsigned long long mass_so_far) const {
    return count_so_far >= count && mass_so_far >= mass;
  }
};

class RowSelector {
 public:
  struct SharedStorage {
    int counts[kBins];
    unsigned long long masses[kBins];
    int warp_counts[2][8];
    float row_max;
    int sum;
    unsigned max_key;
    unsigned long long total_mass;
    unsigned long long forced_mass;
    int chosen_bin;
    int count_above;
    unsigned long long mass_above;
  };

  __device__ RowSelector(const SelectProblem& p, int64_t row_of_all, SharedStorage& smem)
      : p_(p), smem_(smem), row_(p, row_of_all) {}

  __device__ void run() {
    int forced = 0;
    for_each([&](int, bool is_forced, uint32_t) { forced += is_forced; });
    forced = block_sum(forced);

    Target target = {row_.budget(p_, forced) - forced, 0};
    if (p_.rule == SelectRule::kTopP) target.mass = mass_target();
    uint32_t threshold = 0xffffffffu;
    int ties = 0;
    if (!target.reached(0, 0)) descend(target, &threshold, &ties);
    write(threshold, ties);
  }

 private:
  // f(column, forced, key) over this thread's visible columns.
  template <class F>
  __device__ void for_each(F&& f) const {
    for (int column = row_.begin() + threadIdx.x; column < row_.end(); column += blockDim.x) {
      f(column, row_.is_forced(column), score_order(row_.score(column)));
    }
  }

  // Softmax weight of a score in fixed point. An infinite maximum leaves mass only to the infinite
  // scores.
  __device__ unsigned long long mass_of(float score) const {
    if (score != score || score == negative_infinity()) return 0;
    // Double precision, as on the CPU: both backends then round to the same integer.
    const double weight =
        score == smem_.row_max ? 1.0 : exp(static_cast<double>(score - smem_.row_max));
    return static_cast<unsigned long long>(llround(weight * kMassOne));
  }

  // Mass that blocks outside the forced set must still bring.
  __device__ unsigned long long mass_target() {
    if (threadIdx.x == 0) {
      smem_.max_key = 0;
      smem_.total_mass = 0;
      smem_.forced_mass = 0;
    }
    __syncthreads();
    uint32_t best = 0;
    for_each([&](int, bool, uint32_t key) { best = max(best, key); });
    atomicMax(&smem_.max_key, best);
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t key = smem_.max_key;
      smem_.row_max = key == 0
                          ? negative_infinity()
                          : __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
    }
    __syncthreads();
    unsigned long long total = 0;
    unsigned long long forced = 0;
    for_each([&](int column, bool is_forced, uint32_t) {
      const unsigned long long mass = mass_of(row_.score(column));
      total += mass;
      if (is_forced) forced += mass;
    });
    atomicAdd(&smem_.total_mass, total);
    atomicAdd(&smem_.forced_mass, forced);
    __syncthreads();
    const auto wanted =
        static_cast<unsigned long long>(ceil(p_.top_p * static_cast<double>(smem_.total_mass)));
    const unsigned long long mass = min(wanted, smem_.total_mass);
    return mass > smem_.forced_mass ? mass - smem_.forced_mass : 0;
  }

  // Finds the key at which the descending ranking of unforced blocks reaches the target, and how
  // many blocks of exactly that key it needs. If the target is out of reach every block is kept.
  __device__ void descend(const Target& target, uint32_t* threshold, int* ties) {
    const bool masses = target.mass > 0;
    uint32_t prefix = 0;
    int count = 0;
    unsigned long long mass = 0;
    for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
      for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
        smem_.counts[bin] = 0;
        smem_.masses[bin] = 0;
      }
      __syncthreads();
      for_each([&](int column, bool is_forced, uint32_t key) {
        const bool in_prefix = (static_cast<uint64_t>(key) >> (shift + kDigitBits)) == prefix;
        if (is_forced || !in_prefix) return;
        const int bin = static_cast<int>(key >> shift) & (kBins - 1);
        atomicAdd(&smem_.counts[bin], 1);
        if (masses) atomicAdd(&smem_.masses[bin], mass_of(row_.score(column)));
      });
      __syncthreads();
      if (threadIdx.x < kWarpThreads) choose_bin(target, count, mass);
      __syncthreads();
      prefix = prefix << kDigitBits | static_cast<uint32_t>(smem_.chosen_bin);
      count = smem_.count_above;
      mass = smem_.mass_above;
    }
    *threshold = prefix;
    const int equal = smem_.counts[smem_.chosen_bin];
    int needed = max(0, target.count - count);
    if (masses && target.mass > mass) {
      const unsigned long long each = equal > 0 ? smem_.masses[smem_.chosen_bin] / equal : 0;
      const unsigned long long missing = target.mass - mass;
      const unsigned long long by_mass = each > 0 ? (missing + each - 1) / each : equal;
      needed =
          max(needed,
              static_cast<int>(by_mass < static_cast<unsigned long long>(equal) ? by_mass : equal));
    }
    *ties = min(needed, equal);
  }

  // One warp: the highest bin at which count and mass, added from the top, reach the target (bin 0
  // if none does).
  __device__ void choose_bin(const Target& target, int count, unsigned long long mass) {
    constexpr int kBinsPerLane = kBins / kWarpThreads;
    const int lane = threadIdx.x;
    const int top = kBins - 1 - lane * kBinsPerLane;
    int lane_count = 0;
    unsigned long long lane_mass = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) {
      lane_count += smem_.counts[top - i];
      lane_mass += smem_.masses[top - i];
    }
    int count_through = lane_count;
    unsigned long long mass_through = lane_mass;
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      const int c = __shfl_up_sync(0xffffffffu, count_through, distance);
      const unsigned long long m = __shfl_up_sync(0xffffffffu, mass_through, distance);
      if (lane >= distance) {
        count_through += c;
        mass_through += m;
      }
    }
    const unsigned reached =
        __ballot_sync(0xffffffffu, target.reached(count + count_through, mass + mass_through));
    const int owner = reached == 0 ? kWarpThreads - 1 : __ffs(reached) - 1;
    if (lane != owner) return;
    int above = count + count_through - lane_count;
    unsigned long long mass_above = mass + mass_through - lane_mass;
    int bin = top;
    for (int last = top - kBinsPerLane + 1; bin > last; --bin) {
      if (target.reached(above + smem_.counts[bin], mass_above + smem_.masses[bin])) break;
      above += smem_.counts[bin];
      mass_above += smem_.masses[bin];
    }
    smem_.chosen_bin = bin;
    smem_.count_above = above;
    smem_.mass_above = mass_above;
  }

  // Appends forced blocks, blocks above the threshold and the first `ties` blocks at it, in
  // ascending order.
  __device__ void write(uint32_t threshold, int ties) {
    int written = 0;
    int ties_seen = 0;
    for (int base = row_.begin(); base < row_.end(); base += blockDim.x) {
      const int column = base + static_cast<int>(threadIdx.x);
      bool keep = false;
      bool tie = false;
      if (column < row_.end()) {
        const uint32_t key = score_order(row_.score(column));
        keep = row_.is_forced(column) || key > threshold;
        tie = !keep && key == threshold;
      }
      int tie_total;
      const int tie_rank = ties_seen + block_rank(tie, 0, &tie_total);
      keep |= tie && tie_rank < ties;
      int keep_total;
      const int position = written + block_rank(keep, 1, &keep_total);
      if (keep) row_.put(position, column);
      ties_seen += tie_total;
      written += keep_total;
    }
    row_.finish(written, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  }

  // Number of threads before this one with the flag set; `total` over the CTA. Two buffers let
  // consecutive calls share barriers.
  __device__ int block_rank(bool flag, int buffer, int* total) {
    const int lane = threadIdx.x % kWarpThreads;
    const int warp = threadIdx.x / kWarpThreads;
    const unsigned votes = __ballot_sync(0xffffffffu, flag);
    __syncthreads();
    if (lane == 0) smem_.warp_counts[buffer][warp] = __popc(votes);
    __syncthreads();
    int before = 0;
    *total = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x) / kWarpThreads; ++i) {
      const int count = smem_.warp_counts[buffer][i];
      if (i < warp) before += count;
      *total += count;
    }
    return before + __popc(votes & ((1u << lane) - 1));
  }

  __device__ int block_sum(int value) {
    if (threadIdx.x == 0) smem_.sum = 0;
    __syncthreads();
    if (value != 0) atomicAdd(&smem_.sum, value);
    __syncthreads();
    const int sum = smem_.sum;
    __syncthreads();
    return sum;
  }

  const SelectProblem& p_;
  SharedStorage& smem_;
  SelectRow row_;
};

__global__ void __launch_bounds__(256)
    select_blocks_kernel(const __grid_constant__ SelectProblem problem) {
  __shared__ RowSelector::SharedStorage smem;
  RowSelector(problem, blockIdx.x, smem).run();
}

}  // namespace attnsieve::sm80
