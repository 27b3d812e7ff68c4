// The definition of attend, sequentially and in double precision: what the backend is held against.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attend_case.h"

namespace attnsieve::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// The sequential definition of the specification, one group of 64 rows at a time.
class Reference {
 public:
  Reference(AttendData& data, Expected& expected)
      : data_(data), spec_(data.spec), expected_(expected) {}

  void group(int64_t b, int64_t h, int64_t row_begin) {
    const bool varlen = !data_.cu_q.empty();
    b_ = varlen ? 0 : b;
    q0_ = varlen ? data_.cu_q[b] : 0;
    k0_ = varlen ? data_.cu_k[b] : 0;
    sq_ = varlen ? data_.cu_q[b + 1] - q0_ : spec_.seqlen_q;
    sk_ = varlen ? data_.cu_k[b + 1] - k0_ : spec_.seqlen_k;
    if (spec_.page_size > 0) sk_ = std::clamp<int64_t>(data_.seq_lens[b], 0, spec_.seqlen_k);
    unit_ = spec_.indexed ? std::min(spec_.block_k, 64) : 64;
    h_ = h;
    kv_ = h / (spec_.num_heads / spec_.num_kv_heads);
    row_begin_ = row_begin;
    rows_ = std::min<int64_t>(64, sq_ - row_begin);
    max_.assign(rows_, -kInf);
    sum_.assign(rows_, 0.0);
    acc_.assign(rows_ * spec_.head_dim, 0.0);

    const std::vector<std::vector<int64_t>> tiles = tiles_of(b);
    int64_t* counters = expected_.counters.data() + (b * spec_.num_heads + h) * 2;
    counters[1] += static_cast<int64_t>(tiles.size());
    for (size_t i = 0; i < tiles.size(); ++i) {
      const std::vector<int64_t>& tile = tiles[i];
      if (i > 0 && spec_.threshold && skips(tile)) {
        ++counters[0];
      } else {
        for (int64_t unit : tile) visit(unit);
      }
    }
    store();
  }

 private:
  // Row `row` of the sequence stands where it can see the key, whether or not the key exists.
  bool reaches(int64_t row, int64_t key) const {
    const int64_t diagonal = row + sk_ - sq_;
    if (key >= sk_) return false;
    if (spec_.mask.causal && key > diagonal) return false;
    if (spec_.mask.window_left >= 0 && key < diagonal - spec_.mask.window_left) return false;
    return spec_.mask.window_right < 0 || key <= diagonal + spec_.mask.window_right;
  }

  bool sees(int64_t i, int64_t key) const {
    return reaches(row_begin_ + i, key) && data_.key_exists(b_, key);
  }

  bool any_reaches(int64_t row_begin, int64_t row_end, int64_t unit) const {
    for (int64_t key = unit * unit_; key < (unit + 1) * unit_; ++key) {
      for (int64_t row = row_begin; row < std::min(row_end, sq_); ++row) {
        if (reaches(row, key)) return true;
      }
    }
    return false;
  }

  // In visiting order.
  std::vector<std::vector<int64_t>> tiles_of(int64_t b) const {
    std::vector<std::vector<int64_t>> tiles;
    const int64_t per_tile = spec_.skip_block / unit_;
    if (!spec_.indexed) {
      for (int64_t t = 0; t * spec_.skip_block < sk_; ++t) {
        tiles.emplace_back();
        for (int64_t u = t * per_tile; u < (t + 1) * per_tile; ++u) tiles.back().push_back(u);
      }
    } else {
      const std::vector<int64_t> units = listed_units(b);
      for (size_t i = 0; i < units.size(); ++i) {
        if (i % per_tile == 0) tiles.emplace_back();
        tiles.back().push_back(units[i]);
      }
    }
    if (!spec_.indexed) {  // the group's own last tile goes first; over a list, the row's
      drop_unseen(tiles);
      if (!tiles.empty()) std::rotate(tiles.begin(), tiles.end() - 1, tiles.end());
    } else if (!tiles.empty()) {
      std::rotate(tiles.begin(), tiles.end() - 1, tiles.end());
      drop_unseen(tiles);
    }
    return tiles;
  }

  void drop_unseen(std::vector<std::vector<int64_t>>& tiles) const {
    const auto unseen = [&](const std::vector<int64_t>& tile) {
      return std::none_of(tile.begin(), tile.end(), [&](int64_t unit) {
        return any_reaches(row_begin_, row_begin_ + rows_, unit);
      });
    };
    tiles.erase(std::remove_if(tiles.begin(), tiles.end(), unseen), tiles.end());
  }

  // Units of the index row's list that one of the row's block_q query rows reaches.
  std::vector<int64_t> listed_units(int64_t b) const {
    std::vector<int64_t> units;
    const BlockIndexView& index = data_.problem.index;
    const int64_t row = row_begin_ / spec_.block_q;
    if (row >= index.num_rows) return units;
    const int64_t list = h_ / index.heads_per_list;
    const int64_t flat = (b * spec_.list_heads + list) * index.num_rows + row;
    const int64_t count =
        std::max<int64_t>(0, std::min<int64_t>(data_.counts[flat], index.capacity));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = data_.columns[flat * index.capacity + i];
      if (block < 0 || block * spec_.block_k >= sk_) continue;
      for (int64_t u = block * spec_.block_k / unit_; u < (block + 1) * spec_.block_k / unit_;
           ++u) {
        if (any_reaches(row * spec_.block_q, (row + 1) * spec_.block_q, u)) units.push_back(u);
      }
    }
    return units;
  }

  double logit(int64_t i, int64_t key) const {
    if (!sees(i, key)) return -kInf;
    double dot = 0.0;
    for (int64_t d = 0; d < spec_.head_dim; ++d) {
      dot += static_cast<double>(data_.q.at(b_, h_, q0_ + row_begin_ + i, d)) *
             data_.k.at(b_, kv_, k0_ + key, d);
    }
    return dot * data_.problem.softmax_scale;
  }

  bool skips(const std::vector<int64_t>& tile) const {
    if (*spec_.threshold <= 0.0f) return false;
    bool all = true;
    double margin = kInf;  // how far the most reluctant row is from the threshold
    for (int64_t i = 0; i < rows_; ++i) {
      double max = -kInf;
      for (int64_t unit : tile) {
        for (int64_t key = unit * unit_; key < (unit + 1) * unit_; ++key) {
          const double s = logit(i, key);
          max = std::isnan(s) || std::isnan(max) ? std::nan("") : std::max(max, s);
        }
      }
      if (max == -kInf) continue;
      const double distance = std::log(static_cast<double>(*spec_.threshold)) - (max - max_[i]);
      if (!(distance > 0)) all = false;
      if (!std::isnan(distance)) margin = std::min(margin, distance);
    }
    expected_.smallest_margin = std::min(expected_.smallest_margin, std::abs(margin));
    return all;
  }

  void visit(int64_t unit) {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t key = unit * unit_; key < (unit + 1) * unit_; ++key) {
        if (!sees(i, key)) continue;
        expected_.attended[(b_ * spec_.num_kv_heads + kv_) * spec_.seqlen_k + k0_ + key] = true;
        const double s = logit(i, key);
        const double top =
            std::isnan(s) || std::isnan(max_[i]) ? std::nan("") : std::max(max_[i], s);
        if (top == -kInf) continue;
        const double rescale = max_[i] == top ? 1.0 : std::exp(max_[i] - top);
        const double p = std::exp(s - top);
        sum_[i] = sum_[i] * rescale + p;
        for (int64_t d = 0; d < spec_.head_dim; ++d) {
          double& a = acc_[i * spec_.head_dim + d];
          a = a * rescale + p * data_.v.at(b_, kv_, k0_ + key, d);
        }
        max_[i] = top;
      }
    }
  }

  void store() {
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t row = (b_ * spec_.num_heads + h_) * spec_.seqlen_q + q0_ + row_begin_ + i;
      double lse = max_[i] == -kInf ? -kInf : max_[i] + std::log(sum_[i]);
      if (spec_.sink) {
        const double sink = data_.sink[h_];
        lse = lse == -kInf ? sink : lse + std::log1p(std::exp(sink - lse));
      }
      expected_.lse[row] = lse;
      for (int64_t d = 0; d < spec_.head_dim; ++d) {
        expected_.out[row * spec_.head_dim + d] =
            max_[i] == -kInf ? 0.0 : acc_[i * spec_.head_dim + d] * std::exp(max_[i] - lse);
      }
    }
  }

  AttendData& data_;
  const AttendCase& spec_;
  Expected& expected_;
  int64_t b_ = 0, q0_ = 0, k0_ = 0, sq_ = 0, sk_ = 0, h_ = 0, kv_ = 0, row_begin_ = 0, rows_ = 0,
          unit_ = 64;
  std::vector<double> max_, sum_, acc_;
};

}  // namespace

Expected expected_of(AttendData& data) {
  const AttendCase& c = data.spec;
  Expected expected;
  expected.out.assign(data.out.values.size(), std::nan(""));
  expected.lse.assign(data.lse.size(), std::nan(""));
  expected.attended.assign(c.batch * c.num_kv_heads * c.seqlen_k, false);
  expected.counters.assign(data.counters.size(), 0);
  Reference reference(data, expected);
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t rows = data.cu_q.empty() ? c.seqlen_q : data.cu_q[b + 1] - data.cu_q[b];
    for (int64_t h = 0; h < c.num_heads; ++h) {
      for (int64_t row = 0; row < rows; row += 64) reference.group(b, h, row);
    }
  }
  return expected;
}

}  // namespace attnsieve::test
