#include "attend_group.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "key_steps.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::align_val_t kAlignment{64};

class GroupRun {
 public:
  GroupRun(const AttendProblem& problem, const Kernels& kernels, const Group& group,
           GroupScratch& scratch)
      : problem_(problem), kernels_(kernels), group_(group), scratch_(scratch) {
    columns_ = (group.rows + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
    const int64_t row_end = group.row_begin + group.rows;
    visible_ = visible_keys(problem.mask, group.row_begin, row_end, group.seqlen_q, group.seqlen_k);
    for (int i = 0; i < group.rows; ++i) {
      const int64_t row = group.row_begin + i;
      const KeyRange keys =
          visible_keys(problem.mask, row, row + 1, group.seqlen_q, group.seqlen_k);
      scratch.key_begin[i] = keys.begin;
      scratch.key_end[i] = keys.end;
    }
  }

  TileCounts run() {
    const UnitWalk walk = plan_walk(problem_, group_, visible_, scratch_.units);
    const KeySteps steps(problem_, group_, scratch_, visible_);
    const float log_threshold = log_of_threshold();
    const bool votes = problem_.threshold.enabled && log_threshold > -kInfinity;
    const int64_t tiles = walk.tiles();
    TileCounts counts;
    for (int64_t i = 0; i < tiles; ++i) {
      // The last tile first: it holds the diagonal, whose large logits let the threshold skip most.
      const int64_t t = i == 0 ? tiles - 1 : i - 1;
      if (!steps.sees(walk, t)) continue;
      if (counts.total++ == 0) {
        start();
        visit_tile(walk, steps, t);
      } else if (!votes) {
        visit_tile(walk, steps, t);
      } else if (!visit_tile_unless_below(walk, steps, t, log_threshold)) {
        ++counts.skipped;
      }
    }
    if (counts.total == 0) {
      std::fill_n(scratch_.row_max, kColumns, -kInfinity);
      std::fill_n(scratch_.row_sum, kColumns, 0.0f);
    }
    finish();
    return counts;
  }

 private:
  const char* rows_of(const HeadTensor& tensor, const KeyRun& run) const {
    const int64_t batch = problem_.is_paged() ? run.page : group_.batch;
    const int64_t kv_head = group_.head / problem_.group_size();
    const int64_t offset =
        batch * tensor.stride_batch + kv_head * tensor.stride_head + run.row * tensor.stride_row;
    return static_cast<const char*>(tensor.data) + offset * element_size(problem_.dtype);
  }

  // The step's rows of K or V as float32: in place when they lie side by side, otherwise copied.
  // Rows a power of two apart ([B, S, H, D] storage) fall into few cache sets and evict each other:
  // with 2 KiB between rows copying is 1.5 times as fast (AVX-512, Zen 4, 2026-11).
  const float* float_rows(const HeadTensor& tensor, const KeyStep& step) const {
    const int64_t head_dim = problem_.head_dim;
    if (problem_.dtype == DType::kFloat32 && tensor.stride_row == head_dim && step.num_runs == 1) {
      return reinterpret_cast<const float*>(rows_of(tensor, step.runs[0]));
    }
    float* to = scratch_.widened;
    for (int i = 0; i < step.num_runs; ++i) {
      const KeyRun& run = step.runs[i];
      kernels_.widen(rows_of(tensor, run), problem_.dtype, tensor.stride_row, run.count, head_dim,
                     to);
      to += run.count * head_dim;
    }
    return scratch_.widened;
  }

  // -inf for 0 and NaN for anything that is no threshold: both skip nothing.
  float log_of_threshold() const {
    const Threshold& threshold = problem_.threshold;
    if (!threshold.enabled) return -kInfinity;
    const float* per_head = threshold.per_head;
    const float lambda =
        per_head
            ? per_head[group_.batch * threshold.stride_batch + group_.head * threshold.stride_head]
            : threshold.value;
    return std::log(lambda);
  }

  void start() {
    const int64_t offset = group_.batch * problem_.q.stride_batch +
                           group_.head * problem_.q.stride_head +
                           (group_.q_start + group_.row_begin) * problem_.q.stride_row;
    const char* q =
        static_cast<const char*>(problem_.q.data) + offset * element_size(problem_.dtype);
    const int head_dim = static_cast<int>(problem_.head_dim);
    kernels_.pack_query(q, problem_.dtype, problem_.q.stride_row, group_.rows, head_dim, columns_,
                        scratch_.query_t);
    std::fill_n(scratch_.out_t, problem_.head_dim * kColumns, 0.0f);
    std::fill_n(scratch_.row_max, kColumns, -kInfinity);
    std::fill_n(scratch_.row_sum, kColumns, 0.0f);
  }

  // Scaled and masked logits of one step.
  void step_logits(const KeyStep& step, float* s) const {
    const int head_dim = static_cast<int>(problem_.head_dim);
    kernels_.scores(scratch_.query_t, float_rows(problem_.k, step), head_dim, step.count, head_dim,
                    problem_.softmax_scale, columns_, s);
    if (!step.masked) return;
    for_each_key(step, [&](int i, int64_t key) {
      const RowRange rows = rows_that_see(key);
      float* line = s + i * kColumns;
      std::fill(line, line + rows.begin, -kInfinity);
      std::fill(line + rows.end, line + columns_, -kInfinity);
    });
  }

  // visit(number in the step, position in the sequence)
  template <class Visit>
  static void for_each_key(const KeyStep& step, Visit visit) {
    int i = 0;
    for (int r = 0; r < step.num_runs; ++r) {
      const KeyRun& run = step.runs[r];
      for (int j = 0; j < run.count; ++j) visit(i++, run.key + j);
    }
  }

  struct RowRange {
    int begin;
    int end;
  };

  RowRange rows_that_see(int64_t key) const {
    const int64_t* ends = scratch_.key_end;
    const int64_t* begins = scratch_.key_begin;
    const int64_t first = std::upper_bound(ends, ends + group_.rows, key) - ends;  // key < key_end
    const int64_t last =
        std::upper_bound(begins, begins + group_.rows, key) - begins;  // key_begin <= key
    return {static_cast<int>(first), static_cast<int>(max64(first, last))};
  }

  void visit_step(const KeyStep& step, float* s) {
    kernels_.softmax(s, step.count, columns_, scratch_.row_max, scratch_.row_sum, scratch_.rescale);
    const float* v = float_rows(problem_.v, step);
    if (step.masked && add_values_apart(s, v, step)) return;
    const int head_dim = static_cast<int>(problem_.head_dim);
    kernels_.accumulate(s, v, head_dim, step.count, head_dim, scratch_.rescale, columns_,
                        scratch_.out_t);
  }

  // A masked key has p = 0, but 0 * NaN is NaN: values that are not finite are zeros in the product,
  // and added to the query rows that see their key. The others' bits do not depend on them. False,
  // having done nothing, when all values are finite.
  bool add_values_apart(const float* p, const float* v, const KeyStep& step) {
    const int head_dim = static_cast<int>(problem_.head_dim);
    const int64_t values = static_cast<int64_t>(step.count) * head_dim;
    const auto is_finite = [](float x) { return std::isfinite(x); };
    if (std::all_of(v, v + values, is_finite)) return false;
    float* finite = scratch_.widened;  // v may lie there
    std::transform(v, v + values, finite, [&](float x) { return is_finite(x) ? x : 0.0f; });
    kernels_.accumulate(p, finite, head_dim, step.count, head_dim, scratch_.rescale, columns_,
                        scratch_.out_t);
    v = float_rows(problem_.v, step);
    for_each_key(step, [&](int i, int64_t key) {
      const RowRange rows = rows_that_see(key);
      for (int d = 0; d < head_dim; ++d) {
        const float value = v[i * head_dim + d];
        if (is_finite(value)) continue;
        for (int c = rows.begin; c < rows.end; ++c) {
          scratch_.out_t[d * kColumns + c] += p[i * kColumns + c] * value;
        }
      }
    });
    return true;
  }

  void visit_tile(const UnitWalk& walk, const KeySteps& steps, int64_t t) {
    for (int64_t i = walk.tile_begin(t); i < walk.tile_end(t);) {
      const KeyStep step = steps.next(walk, &i, walk.tile_end(t));
      if (step.count == 0) continue;
      step_logits(step, scratch_.tile);
      visit_step(step, scratch_.tile);
    }
  }

  // False: every row voted to skip.
  bool visit_tile_unless_below(const UnitWalk& walk, const KeySteps& steps, int64_t t,
                               float log_threshold) {
    std::fill_n(scratch_.tile_max, kColumns, -kInfinity);
    KeyStep tile[kMaxSkipBlock / kUnitKeys];
    int count = 0;
    for (int64_t i = walk.tile_begin(t); i < walk.tile_end(t);) {
      const KeyStep step = steps.next(walk, &i, walk.tile_end(t));
      if (step.count == 0) continue;
      float* s = scratch_.tile + count * kUnitKeys * kColumns;
      step_logits(step, s);
      kernels_.max_over_keys(s, step.count, columns_, scratch_.tile_max);
      tile[count++] = step;
    }
    bool below = true;
    for (int row = 0; row < group_.rows; ++row) {
      const float tile_max = scratch_.tile_max[row];
      below = below && (tile_max == -kInfinity || tile_max - scratch_.row_max[row] < log_threshold);
    }
    if (below) return false;
    for (int i = 0; i < count; ++i) visit_step(tile[i], scratch_.tile + i * kUnitKeys * kColumns);
    return true;
  }

  // The sink, the division by the sum, the log-sum-exp, and the stores.
  void finish() {
    float* row_scale = scratch_.rescale;
    const int64_t token = group_.q_start + group_.row_begin;
    float* lse = nullptr;
    if (problem_.lse.data != nullptr) {
      lse = problem_.lse.data + group_.batch * problem_.lse.stride_batch +
            group_.head * problem_.lse.stride_head + token * problem_.lse.stride_row;
    }
    for (int row = 0; row < group_.rows; ++row) {
      double max = scratch_.row_max[row];
      double sum = scratch_.row_sum[row];
      double scale = 1.0;
      if (problem_.sink != nullptr) {
        // Relative to the larger of the two, so that neither exponential overflows.
        const double sink = problem_.sink[group_.head];
        const double top =
            max > sink ? max : (sink >= max ? sink : max + sink);  // the sum carries a NaN
        scale = max == top ? 1.0 : std::exp(max - top);
        sum = sum * scale + (sink == top ? (sink == -kInfinity ? 0.0 : 1.0) : std::exp(sink - top));
        max = top;
      }
      const bool empty = max == -kInfinity;
      const bool no_keys = scratch_.row_max[row] == -kInfinity;
      row_scale[row] = empty || no_keys ? 0.0f : static_cast<float>(scale / sum);
      if (lse)
        lse[row * problem_.lse.stride_row] =
            static_cast<float>(empty ? -kInfinity : max + std::log(sum));
    }
    const HeadTensor& out = problem_.out;
    const int64_t offset =
        group_.batch * out.stride_batch + group_.head * out.stride_head + token * out.stride_row;
    kernels_.store_out(scratch_.out_t, row_scale, group_.rows, static_cast<int>(problem_.head_dim),
                       problem_.dtype, out.stride_row,
                       static_cast<char*>(out.data) + offset * element_size(problem_.dtype));
  }

  const AttendProblem& problem_;
  const Kernels& kernels_;
  const Group& group_;
  GroupScratch& scratch_;
  int columns_;
  KeyRange visible_;
};

}  // namespace

bool GroupScratch::allocate(const AttendProblem& problem) {
  const int64_t head_rows = problem.head_dim * kColumns;
  const int64_t unit = kUnitKeys * problem.head_dim;
  const int64_t floats = 2 * head_rows + kMaxSkipBlock * kColumns + unit + 4 * kColumns;
  const int64_t listed =
      problem.is_indexed() ? problem.index.capacity * units_per_block(problem.index) : 0;
  const int64_t bytes =
      floats * sizeof(float) + 2 * kColumns * sizeof(int64_t) + listed * sizeof(int32_t);
  memory_ = ::operator new(static_cast<size_t>(bytes), kAlignment, std::nothrow);
  if (memory_ == nullptr) return false;
  query_t = static_cast<float*>(memory_);
  out_t = query_t + head_rows;
  tile = out_t + head_rows;
  widened = tile + kMaxSkipBlock * kColumns;
  row_max = widened + unit;
  row_sum = row_max + kColumns;
  rescale = row_sum + kColumns;
  tile_max = rescale + kColumns;
  key_begin = reinterpret_cast<int64_t*>(tile_max + kColumns);
  key_end = key_begin + kColumns;
  units = reinterpret_cast<int32_t*>(key_end + kColumns);
  return true;
}

GroupScratch::~GroupScratch() { ::operator delete(memory_, kAlignment); }

TileCounts attend_group(const AttendProblem& problem, const Kernels& kernels, const Group& group,
                        GroupScratch& scratch) {
  return GroupRun(problem, kernels, group, scratch).run();
}

}  // namespace attnsieve::cpu
