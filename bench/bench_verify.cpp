// A group is the 64 query rows that share a threshold decision; it is computed tile by tile in the
// order of the semantics. Without a threshold the order is immaterial and a few rows of the group
// are enough; with one, all rows vote.
#include "bench_verify.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attnsieve/visibility.h"
#include "kernels.h"

namespace attnsieve::bench {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
// A vote closer to its threshold than float32 rounding of the logits may fall either way.
constexpr double kVoteMargin = 1e-4;

// Half a unit in the last place of 1.
double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return std::ldexp(1.0, -24);
    case DType::kFloat16: return std::ldexp(1.0, -11);
    case DType::kBFloat16: return std::ldexp(1.0, -8);
  }
  return 0.0;
}

std::vector<float> rows_of(const std::vector<uint8_t>& storage, DType dtype, int64_t first_row,
                           int64_t rows, int64_t head_dim) {
  std::vector<float> values(rows * head_dim);
  const int64_t bytes = cpu::element_size(dtype);
  cpu::kernels().widen(storage.data() + first_row * head_dim * bytes, dtype, head_dim, rows,
                       head_dim, values.data());
  return values;
}

class GroupReference {
 public:
  GroupReference(const BenchCase& c, const BenchInputs& inputs, int64_t head, int64_t row_begin)
      : case_(c),
        inputs_(inputs),
        head_(head),  // b * num_heads + h
        row_begin_(row_begin),
        row_end_(std::min(row_begin + kGroupRows, c.seqlen_q)),
        unit_keys_(c.indexed ? std::min<int64_t>(c.block_k, kUnitKeys) : kUnitKeys),
        scale_(1.0 / std::sqrt(static_cast<double>(c.head_dim))) {
    const int64_t count = row_end_ - row_begin_;
    const int64_t step = c.threshold ? 1 : std::max<int64_t>(1, (count - 1) / 3);
    for (int64_t i = 0; i < count; i += step) rows_.push_back(row_begin_ + i);
    max_.assign(rows_.size(), -kInf);
    sum_.assign(rows_.size(), 0.0);
    acc_.assign(rows_.size() * c.head_dim, 0.0);
    magnitude_.assign(rows_.size() * c.head_dim, 0.0);
    for (int64_t row : rows_) {
      const std::vector<float> q =
          rows_of(inputs.q, c.dtype, head * c.seqlen_q + row, 1, c.head_dim);
      q_.insert(q_.end(), q.begin(), q.end());
    }
    run();
  }

  bool decided() const { return smallest_margin_ > kVoteMargin; }

  void compare(const std::vector<uint8_t>& out, const std::vector<float>& lse,
               Verification& result) const {
    const double roundoff = unit_roundoff(case_.dtype);
    constexpr double kFloatSlack = 1e-5;  // float32 accumulation and the exponential
    for (size_t i = 0; i < rows_.size(); ++i) {
      const int64_t flat = head_ * case_.seqlen_q + rows_[i];
      const std::vector<float> got = rows_of(out, case_.dtype, flat, 1, case_.head_dim);
      for (int64_t d = 0; d < case_.head_dim; ++d) {
        const size_t at = i * case_.head_dim + d;
        const double expected = sum_[i] > 0.0 ? acc_[at] / sum_[i] : 0.0;
        const double magnitude = sum_[i] > 0.0 ? magnitude_[at] / sum_[i] : 0.0;
        // Each weight and the result are rounded once to the dtype.
        const double bound = (2.0 * roundoff + kFloatSlack) * magnitude + 1e-7;
        raise(result.worst_out, std::abs(got[d] - expected) / bound);
      }
      const double expected_lse = sum_[i] > 0.0 ? max_[i] + std::log(sum_[i]) : -kInf;
      const double error = expected_lse == lse[flat] ? 0.0 : std::abs(lse[flat] - expected_lse);
      raise(result.worst_lse, error / (1e-4 + kFloatSlack * std::abs(expected_lse)));
      ++result.rows;
    }
  }

 private:
  // NaN counts as the worst error.
  static void raise(double& worst, double value) {
    worst = std::isnan(value) ? kInf : std::max(worst, value);
  }

  std::vector<int64_t> units() const {
    int64_t first_row = row_begin_;
    int64_t end_row = row_end_;
    if (case_.indexed) {  // a list is cut by what its whole q-block sees
      first_row = row_begin_ / case_.block_q * case_.block_q;
      end_row = std::min(first_row + case_.block_q, case_.seqlen_q);
    }
    const KeyRange visible =
        visible_keys(case_.mask(), first_row, end_row, case_.seqlen_q, case_.seqlen_k);
    std::vector<int64_t> kept;
    const auto keep = [&](int64_t unit) {
      if (unit * unit_keys_ < visible.end && (unit + 1) * unit_keys_ > visible.begin)
        kept.push_back(unit);
    };
    if (!case_.indexed) {
      for (int64_t unit = 0; unit * unit_keys_ < case_.seqlen_k; ++unit) keep(unit);
      return kept;
    }
    const int64_t list = head_ * case_.num_q_blocks() + row_begin_ / case_.block_q;
    const int64_t units_per_block = case_.block_k / unit_keys_;
    for (int32_t i = 0; i < inputs_.counts[list]; ++i) {
      const int64_t block = inputs_.columns[list * inputs_.capacity + i];
      for (int64_t u = 0; u < units_per_block; ++u) keep(block * units_per_block + u);
    }
    return kept;
  }

  void run() {
    const size_t units_per_tile = Threshold().skip_block / unit_keys_;
    const std::vector<int64_t> kept = units();
    const size_t tiles = (kept.size() + units_per_tile - 1) / units_per_tile;
    for (size_t visit = 0; visit < tiles; ++visit) {
      const size_t tile = visit == 0 ? tiles - 1 : visit - 1;
      const size_t end = std::min(kept.size(), (tile + 1) * units_per_tile);
      std::vector<int64_t> tile_units(kept.begin() + tile * units_per_tile, kept.begin() + end);
      attend_tile(tile_units, visit > 0);
    }
  }

  void attend_tile(const std::vector<int64_t>& tile_units, bool may_skip) {
    std::vector<std::vector<double>> logits(rows_.size());
    std::vector<float> v;
    for (int64_t unit : tile_units) {
      const int64_t begin = unit * unit_keys_;
      const int64_t keys = std::min<int64_t>(unit_keys_, case_.seqlen_k - begin);
      const int64_t kv_head = head_ / (case_.num_heads / case_.num_kv_heads);
      const int64_t first = kv_head * case_.seqlen_k + begin;
      const std::vector<float> k = rows_of(inputs_.k, case_.dtype, first, keys, case_.head_dim);
      const std::vector<float> v_unit =
          rows_of(inputs_.v, case_.dtype, first, keys, case_.head_dim);
      v.insert(v.end(), v_unit.begin(), v_unit.end());
      for (size_t i = 0; i < rows_.size(); ++i) {
        const KeyRange seen =
            visible_keys(case_.mask(), rows_[i], rows_[i] + 1, case_.seqlen_q, case_.seqlen_k);
        for (int64_t j = 0; j < keys; ++j) {
          double dot = 0.0;
          for (int64_t d = 0; d < case_.head_dim; ++d)
            dot += static_cast<double>(q_[i * case_.head_dim + d]) * k[j * case_.head_dim + d];
          const bool visible = begin + j >= seen.begin && begin + j < seen.end;
          logits[i].push_back(visible ? dot * scale_ : -kInf);
        }
      }
    }
    if (case_.threshold && may_skip && votes_to_skip(logits)) return;
    for (size_t i = 0; i < rows_.size(); ++i) accumulate(i, logits[i], v);
  }

  bool votes_to_skip(const std::vector<std::vector<double>>& logits) {
    if (*case_.threshold == 0.0f) return false;
    const double limit = std::log(static_cast<double>(*case_.threshold));
    double largest = -kInf;  // of m_tile - m_run
    for (size_t i = 0; i < rows_.size(); ++i) {
      const double tile_max = *std::max_element(logits[i].begin(), logits[i].end());
      if (tile_max == -kInf) continue;
      largest = std::max(largest, tile_max - max_[i]);
    }
    smallest_margin_ = std::min(smallest_margin_, std::abs(largest - limit));
    return largest < limit;
  }

  void accumulate(size_t i, const std::vector<double>& logits, const std::vector<float>& v) {
    const double new_max = std::max(max_[i], *std::max_element(logits.begin(), logits.end()));
    if (new_max == -kInf) return;
    const double rescale = std::exp(max_[i] - new_max);
    sum_[i] *= rescale;
    max_[i] = new_max;
    double* acc = acc_.data() + i * case_.head_dim;
    double* magnitude = magnitude_.data() + i * case_.head_dim;
    for (int64_t d = 0; d < case_.head_dim; ++d) {
      acc[d] *= rescale;
      magnitude[d] *= rescale;
    }
    for (size_t j = 0; j < logits.size(); ++j) {
      if (logits[j] == -kInf) continue;
      const double weight = std::exp(logits[j] - new_max);
      sum_[i] += weight;
      for (int64_t d = 0; d < case_.head_dim; ++d) {
        const double value = v[j * case_.head_dim + d];
        acc[d] += weight * value;
        magnitude[d] += weight * std::abs(value);
      }
    }
  }

  const BenchCase& case_;
  const BenchInputs& inputs_;
  const int64_t head_, row_begin_, row_end_;
  const int64_t unit_keys_;
  const double scale_;
  std::vector<int64_t> rows_;
  std::vector<float> q_;
  std::vector<double> max_, sum_, acc_, magnitude_;  // magnitude: sum of weight * |v|
  double smallest_margin_ = kInf;
};

}  // namespace

Verification verify(const BenchCase& c, const BenchInputs& inputs, const std::vector<uint8_t>& out,
                    const std::vector<float>& lse) {
  Verification result;
  const int64_t groups = (c.seqlen_q + kGroupRows - 1) / kGroupRows;
  const int64_t all = c.batch * c.num_heads * groups;
  const int64_t samples = std::min<int64_t>(all, c.threshold ? 6 : 16);
  for (int64_t sample = 0; sample < samples; ++sample) {
    // Evenly spread, the first and the last group of all among them.
    const int64_t group = samples > 1 ? sample * (all - 1) / (samples - 1) : 0;
    const GroupReference reference(c, inputs, group / groups, group % groups * kGroupRows);
    if (reference.decided()) reference.compare(out, lse, result);
  }
  return result;
}

}  // namespace attnsieve::bench
