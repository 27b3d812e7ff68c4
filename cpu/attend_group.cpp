#include "attend_group.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "attnsieve/visibility.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::align_val_t kAlignment{64};

int64_t units_per_block(const BlockIndexView& index) { return index.block_k / kUnitKeys; }

// The units that the group visits, and how they fall into skip tiles. Position i of the walk is
// unit `unit(i)`; tile t holds positions [tile_begin(t), tile_end(t)). Dense tiles are aligned in
// key position, so the first one may start late (`phase` units are missing); listed tiles are cut
// from the start of the list.
struct UnitWalk {
  const int32_t* listed = nullptr;  // nullptr: consecutive units from `first`
  int64_t first = 0;
  int64_t count = 0;
  int64_t phase = 0;
  int64_t units_per_tile = 1;

  int64_t unit(int64_t i) const { return listed ? listed[i] : first + i; }
  int64_t tiles() const {
    return count == 0 ? 0 : (count + phase + units_per_tile - 1) / units_per_tile;
  }
  int64_t tile_begin(int64_t t) const { return max64(0, t * units_per_tile - phase); }
  int64_t tile_end(int64_t t) const { return min64(count, (t + 1) * units_per_tile - phase); }
};

UnitWalk plan_walk(const AttendProblem& problem, const Group& group, KeyRange visible,
                   int32_t* units) {
  UnitWalk walk;
  walk.units_per_tile = problem.threshold.skip_block / kUnitKeys;
  if (visible.begin >= visible.end) return walk;
  const int64_t unit_begin = visible.begin / kUnitKeys;
  const int64_t unit_end = (visible.end + kUnitKeys - 1) / kUnitKeys;
  const BlockIndexView& index = problem.index;
  if (!problem.is_indexed()) {
    walk.first = unit_begin;
    walk.count = unit_end - unit_begin;
    walk.phase = unit_begin % walk.units_per_tile;
    return walk;
  }
  walk.listed = units;
  const int64_t row = group.row_begin / index.block_q;
  if (row >= index.num_rows) return walk;
  const int64_t list = group.head / index.heads_per_list;
  const int32_t* counts =
      index.counts + group.batch * index.counts_stride_batch + list * index.counts_stride_head;
  const int32_t* columns = index.columns + group.batch * index.columns_stride_batch +
                           list * index.columns_stride_head + row * index.columns_stride_row;
  const int32_t count = std::clamp(counts[row], 0, index.capacity);
  const int64_t blocks = (group.seqlen_k + index.block_k - 1) / index.block_k;
  for (int32_t i = 0; i < count; ++i) {
    const int64_t block = columns[i];
    if (block < 0 || block >= blocks) continue;
    for (int64_t u = block * units_per_block(index); u < (block + 1) * units_per_block(index);
         ++u) {
      if (u >= unit_begin && u < unit_end) units[walk.count++] = static_cast<int32_t>(u);
    }
  }
  return walk;
}

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
    const int64_t kv_head = group.head / problem.group_size();
    k_ = rows_of(problem.k, kv_head, group.k_start);
    v_ = rows_of(problem.v, kv_head, group.k_start);
  }

  TileCounts run() {
    const UnitWalk walk = plan_walk(problem_, group_, visible_, scratch_.units);
    TileCounts counts;
    counts.total = walk.tiles();
    if (walk.count > 0) {
      start();
      // The last tile first: it holds the diagonal, whose large logits let the threshold skip most.
      visit_tile(walk, counts.total - 1);
      const float log_threshold = log_of_threshold();
      for (int64_t t = 0; t + 1 < counts.total; ++t) {
        if (!problem_.threshold.enabled || !(log_threshold > -kInfinity)) {
          visit_tile(walk, t);
        } else if (!visit_tile_unless_below(walk, t, log_threshold)) {
          ++counts.skipped;
        }
      }
    } else {
      std::fill_n(scratch_.row_max, kColumns, -kInfinity);
      std::fill_n(scratch_.row_sum, kColumns, 0.0f);
    }
    finish();
    return counts;
  }

 private:
  // Keys of one unit that some row of the group sees. `masked`: not every row sees all of them.
  struct UnitKeys {
    int64_t begin;
    int count;
    bool masked;
  };

  const char* rows_of(const HeadTensor& tensor, int64_t head, int64_t row) const {
    const int64_t offset =
        group_.batch * tensor.stride_batch + head * tensor.stride_head + row * tensor.stride_row;
    return static_cast<const char*>(tensor.data) + offset * element_size(problem_.dtype);
  }

  // The unit's rows of K or V as float32: in place when they lie side by side, otherwise copied.
  // Rows a power of two apart ([B, S, H, D] storage) fall into few cache sets and evict each other:
  // with 2 KiB between rows copying is 1.5 times as fast (AVX-512, Zen 4, 2026-11).
  const float* float_rows(const char* base, int64_t stride, UnitKeys keys,
                          int64_t* float_stride) const {
    const char* first = base + keys.begin * stride * element_size(problem_.dtype);
    if (problem_.dtype == DType::kFloat32 && stride == problem_.head_dim) {
      *float_stride = stride;
      return reinterpret_cast<const float*>(first);
    }
    kernels_.widen(first, problem_.dtype, stride, keys.count, problem_.head_dim, scratch_.widened);
    *float_stride = problem_.head_dim;
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

  UnitKeys keys_of(int64_t unit) const {
    const int64_t begin = max64(unit * kUnitKeys, visible_.begin);
    const int64_t end = min64((unit + 1) * kUnitKeys, visible_.end);
    // Both ends of a row's range grow with the row: the last row begins last, the first ends first.
    const bool masked = begin < scratch_.key_begin[group_.rows - 1] || end > scratch_.key_end[0];
    return {begin, static_cast<int>(end - begin), masked};
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

  // Scaled and masked logits of one unit.
  void unit_logits(UnitKeys keys, float* s) const {
    int64_t stride;
    const float* k = float_rows(k_, problem_.k.stride_row, keys, &stride);
    kernels_.scores(scratch_.query_t, k, stride, keys.count, static_cast<int>(problem_.head_dim),
                    problem_.softmax_scale, columns_, s);
    if (!keys.masked) return;
    for (int i = 0; i < keys.count; ++i) {
      const RowRange rows = rows_that_see(keys.begin + i);
      float* line = s + i * kColumns;
      std::fill(line, line + rows.begin, -kInfinity);
      std::fill(line + rows.end, line + columns_, -kInfinity);
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

  void visit_unit(UnitKeys keys, float* s) {
    kernels_.softmax(s, keys.count, columns_, scratch_.row_max, scratch_.row_sum, scratch_.rescale);
    int64_t stride;
    const float* v = float_rows(v_, problem_.v.stride_row, keys, &stride);
    if (keys.masked && add_rows_apart(s, v, stride, keys)) return;
    kernels_.accumulate(s, v, stride, keys.count, static_cast<int>(problem_.head_dim),
                        scratch_.rescale, columns_, scratch_.out_t);
  }

  // A masked key has p = 0, but 0 * NaN is NaN: a value row that is not finite must only be added
  // to the query rows that see it. False, having done nothing, when all value rows are finite.
  bool add_rows_apart(const float* p, const float* v, int64_t stride, UnitKeys keys) {
    const int head_dim = static_cast<int>(problem_.head_dim);
    bool finite[kUnitKeys];
    bool all_finite = true;
    for (int i = 0; i < keys.count; ++i) {
      const float* row = v + i * stride;
      finite[i] = std::all_of(row, row + head_dim, [](float x) { return std::isfinite(x); });
      all_finite = all_finite && finite[i];
    }
    if (all_finite) return false;
    std::fill_n(finite + keys.count, kUnitKeys - keys.count, true);
    const float* no_rescale = scratch_.tile_max;  // free between votes
    std::fill_n(scratch_.tile_max, kColumns, 1.0f);
    const float* rescale = scratch_.rescale;
    for (int i = 0; i < keys.count; ++i) {
      if (finite[i]) {
        kernels_.accumulate(p + i * kColumns, v + i * stride, stride, 1, head_dim, rescale,
                            columns_, scratch_.out_t);
        rescale = no_rescale;
      }
    }
    for (int d = 0; d < head_dim && rescale != no_rescale; ++d) {
      for (int c = 0; c < columns_; ++c) scratch_.out_t[d * kColumns + c] *= scratch_.rescale[c];
    }
    for (int i = 0; i < keys.count; ++i) {
      if (finite[i]) continue;
      const RowRange rows = rows_that_see(keys.begin + i);
      for (int d = 0; d < head_dim; ++d) {
        for (int c = rows.begin; c < rows.end; ++c) {
          scratch_.out_t[d * kColumns + c] += p[i * kColumns + c] * v[i * stride + d];
        }
      }
    }
    return true;
  }

  void visit_tile(const UnitWalk& walk, int64_t t) {
    for (int64_t i = walk.tile_begin(t); i < walk.tile_end(t); ++i) {
      const UnitKeys keys = keys_of(walk.unit(i));
      unit_logits(keys, scratch_.tile);
      visit_unit(keys, scratch_.tile);
    }
  }

  // False: every row voted to skip.
  bool visit_tile_unless_below(const UnitWalk& walk, int64_t t, float log_threshold) {
    std::fill_n(scratch_.tile_max, kColumns, -kInfinity);
    float* s = scratch_.tile;
    for (int64_t i = walk.tile_begin(t); i < walk.tile_end(t); ++i, s += kUnitKeys * kColumns) {
      const UnitKeys keys = keys_of(walk.unit(i));
      unit_logits(keys, s);
      kernels_.max_over_keys(s, keys.count, columns_, scratch_.tile_max);
    }
    bool below = true;
    for (int row = 0; row < group_.rows; ++row) {
      const float tile_max = scratch_.tile_max[row];
      below = below && (tile_max == -kInfinity || tile_max - scratch_.row_max[row] < log_threshold);
    }
    if (below) return false;
    s = scratch_.tile;
    for (int64_t i = walk.tile_begin(t); i < walk.tile_end(t); ++i, s += kUnitKeys * kColumns) {
      visit_unit(keys_of(walk.unit(i)), s);
    }
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
  const char* k_;
  const char* v_;
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
