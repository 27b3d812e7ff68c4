// cpu::estimate_block_scores: maxima of low-bit scores over the pairs of a q-block and a KV block, or
// sums of their exponentials.
//
// Codes are small: products and sums of them are exact in float32, whatever the order, so the
// micro-kernels of attention compute the integers. Sampled query rows are the columns of the
// transposed tiles of kernels.h. Keys of a tile are ordered by cell, the keys of a KV block that
// share a scale: a cell has one maximum a row, and one product of scales.
#include "attnsieve/estimate.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "attnsieve/launch.h"
#include "kernels.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kTileKeys = 128;

float max_nan(float a, float b) { return std::isnan(a) || a > b ? a : b; }

// `count` codes of a row, as float32.
void widen_codes(const CodedRows& rows, const char* row, int64_t count, float* dst) {
  if (rows.bits == 8) {
    const auto* codes = reinterpret_cast<const int8_t*>(row);
    for (int64_t d = 0; d < count; ++d) dst[d] = codes[d];
    return;
  }
  for (int64_t d = 0; d < count; d += 32) {
    for (int64_t i = 0; i < 16; ++i) {
      const auto byte = static_cast<int8_t>(row[d / 2 + i]);
      dst[d + i] = static_cast<float>(byte >> 4);
      dst[d + 16 + i] = static_cast<float>(static_cast<int8_t>(byte << 4) >> 4);
    }
  }
}

int64_t scale_index(const CodedRows& rows, int64_t row) {
  const ScaleLayout layout = rows.layout();
  return row / layout.rows * layout.scales +
         layout.scale_of(rows.scale_rows, static_cast<int32_t>(row % layout.rows));
}

// Keys of a KV block that share a scale: a range of a tile's ordered keys.
struct Cell {
  int begin;
  int end;
  int64_t block;
  float scale;
};

struct Scratch {
  std::vector<float> query_t, keys, scores;
  std::vector<Cell> cells;
  float row_factor[kColumns];
  float threshold[kColumns];
  KeyRange visible[kColumns];
  std::vector<float> best;  // of each KV block: the maximum, or the sum

  explicit Scratch(const EstimateProblem& problem)
      : query_t(problem.head_dim * kColumns),
        keys(kTileKeys * problem.head_dim),
        scores(kTileKeys * kColumns),
        best(problem.num_k_blocks()) {
    cells.reserve(kTileKeys);
  }
};

class BlockRow {
 public:
  BlockRow(const EstimateProblem& problem, const Kernels& kernels, Scratch& scratch, int64_t batch,
           int64_t head, int64_t block)
      : p_(problem),
        kernels_(kernels),
        scratch_(scratch),
        sequence_(sequence_of(problem, batch)),
        batch_(batch),
        head_(head),
        block_(block) {}

  void run() {
    const int64_t begin = block_ * p_.block_q;
    const int64_t end = min64(begin + p_.block_q, sequence_.seqlen_q);
    const int64_t step = int64_t{kColumns} * p_.row_stride;
    for (int64_t row = begin; row < end; row += step) add_rows(row, min64(row + step, end));
    store();
  }

 private:
  void store() const {
    const int64_t blocks = p_.num_k_blocks();
    const int64_t line = (batch_ * p_.num_heads + head_) * p_.num_q_blocks() + block_;
    if (p_.scores != nullptr) {
      std::copy(scratch_.best.begin(), scratch_.best.end(), p_.scores + line * blocks);
      return;
    }
    const int64_t words = (blocks + 31) / 32;
    std::fill_n(p_.bits + line * words, words, 0u);
    for (int64_t b = 0; b < blocks; ++b) {
      const uint32_t keep = !(scratch_.best[b] <= 0.0f);
      p_.bits[line * words + b / 32] |= keep << (b % 32);
    }
  }

  // Sampled rows of [begin, end), at most kColumns.
  void add_rows(int64_t begin, int64_t end) {
    rows_ = static_cast<int>((end - begin + p_.row_stride - 1) / p_.row_stride);
    columns_ = (rows_ + kernels_.lanes - 1) / kernels_.lanes * kernels_.lanes;
    KeyRange all{sequence_.num_keys, 0};
    std::vector<float>& query_t = scratch_.query_t;
    std::fill(query_t.begin(), query_t.end(), 0.0f);
    float codes[256];
    const float* scales = sequence_.q_scales + head_ * p_.q.num_scales;
    for (int i = 0; i < rows_; ++i) {
      const int64_t row = begin + i * p_.row_stride;
      const char* const row_codes =
          sequence_.q_codes + head_ * p_.q.codes.stride_head + row * p_.q.codes.stride_row;
      widen_codes(p_.q, row_codes, p_.head_dim, codes);
      for (int64_t d = 0; d < p_.head_dim; ++d) query_t[d * kColumns + i] = codes[d];
      scratch_.row_factor[i] = scales[scale_index(p_.q, row)] * p_.softmax_scale;
      scratch_.threshold[i] = 0.0f;
      if (sequence_.threshold != nullptr) {
        scratch_.threshold[i] =
            sequence_.threshold[head_ * p_.threshold.stride_head + row * p_.threshold.stride_row];
      }
      KeyRange& own = scratch_.visible[i];
      own = estimated_keys(p_, sequence_, row, row + 1);
      if (own.begin >= own.end) continue;
      all = {min64(all.begin, own.begin), max64(all.end, own.end)};
    }
    for (int64_t key = all.begin / kTileKeys * kTileKeys; key < all.end; key += kTileKeys)
      add_tile(key, min64(key + kTileKeys, sequence_.num_keys));
  }

  void add_tile(int64_t begin, int64_t end) {
    load_keys(begin, end);
    const int keys = static_cast<int>(end - begin);
    float* const scores = scratch_.scores.data();
    kernels_.scores(scratch_.query_t.data(), scratch_.keys.data(), p_.head_dim, keys,
                    static_cast<int>(p_.head_dim), 1.0f, columns_, scores);
    hide(begin, end, scores);
    if (p_.reduce == EstimateReduce::kMax) return add_maxima(scores);
    const auto& cells = scratch_.cells;
    for (size_t first = 0, next = 0; first < cells.size(); first = next) {
      while (next < cells.size() && cells[next].block == cells[first].block) ++next;
      add_sums(scores, first, next);
    }
  }

  void add_maxima(const float* scores) {
    float maxima[kColumns];
    for (const Cell& cell : scratch_.cells) {
      std::fill_n(maxima, kColumns, -kInfinity);
      kernels_.max_over_keys(scores + cell.begin * kColumns, cell.end - cell.begin, columns_,
                             maxima);
      float best = scratch_.best[cell.block];
      for (int i = 0; i < rows_; ++i) {
        if (maxima[i] == -kInfinity) continue;
        best = max_nan(value_of(maxima[i], i, cell), best);
      }
      scratch_.best[cell.block] = best;
    }
  }

  // Of the cells [first, next), which are a KV block's in this tile.
  void add_sums(float* scores, size_t first, size_t next) {
    const auto& cells = scratch_.cells;
    for (size_t c = first; c < next; ++c) {
      for (int at = cells[c].begin; at < cells[c].end; ++at) {
        for (int i = 0; i < rows_; ++i) {
          float& score = scores[at * kColumns + i];
          if (score != -kInfinity) score = value_of(score, i, cells[c]);
        }
      }
    }
    float row_max[kColumns];
    float row_sum[kColumns] = {};
    float rescale[kColumns];
    std::fill_n(row_max, kColumns, -kInfinity);
    const int begin = cells[first].begin;
    kernels_.softmax(scores + begin * kColumns, cells[next - 1].end - begin, columns_, row_max,
                     row_sum, rescale);
    float& sum = scratch_.best[cells[first].block];
    for (int i = 0; i < rows_; ++i) {
      if (row_max[i] == -kInfinity) continue;
      sum += row_max[i] == kInfinity ? kInfinity : row_sum[i] * std::exp(row_max[i]);
    }
  }

  float value_of(float dot, int row, const Cell& cell) const {
    const float factor = scratch_.row_factor[row] * cell.scale;
    const float value = dot * factor;
    return value - scratch_.threshold[row];
  }

  // Codes of the tile's keys, ordered by cell, and the cells.
  void load_keys(int64_t begin, int64_t end) {
    struct Place {
      int64_t block, scale, key;
      bool operator<(const Place& other) const {
        if (block != other.block) return block < other.block;
        return scale != other.scale ? scale < other.scale : key < other.key;
      }
    };
    const int64_t kv_head = head_ / (p_.num_heads / p_.num_kv_heads);
    const float* scales = sequence_.k_scales + kv_head * p_.k.num_scales;
    const char* const codes = sequence_.k_codes + kv_head * p_.k.codes.stride_head;
    Place places[kTileKeys];
    const int count = static_cast<int>(end - begin);
    for (int i = 0; i < count; ++i)
      places[i] = {(begin + i) / p_.block_k, scale_index(p_.k, begin + i), begin + i};
    std::sort(places, places + count);
    scratch_.cells.clear();
    for (int i = 0; i < count; ++i) {
      const Place& place = places[i];
      order_[i] = place.key;
      widen_codes(p_.k, codes + place.key * p_.k.codes.stride_row, p_.head_dim,
                  scratch_.keys.data() + i * p_.head_dim);
      if (i == 0 || place.block != places[i - 1].block || place.scale != places[i - 1].scale)
        scratch_.cells.push_back({i, i, place.block, scales[place.scale]});
      scratch_.cells.back().end = i + 1;
    }
  }

  // Pairs that the mask hides become -inf.
  void hide(int64_t begin, int64_t end, float* scores) const {
    for (int i = 0; i < rows_; ++i) {
      const KeyRange& own = scratch_.visible[i];
      if (own.begin <= begin && own.end >= end) continue;
      for (int64_t at = 0; at < end - begin; ++at) {
        if (order_[at] < own.begin || order_[at] >= own.end) scores[at * kColumns + i] = -kInfinity;
      }
    }
  }

  const EstimateProblem& p_;
  const Kernels& kernels_;
  Scratch& scratch_;
  EstimateSequence sequence_;
  int64_t batch_;
  int64_t head_;
  int64_t block_;
  int rows_ = 0;
  int columns_ = 0;
  int64_t order_[kTileKeys];
};

}  // namespace

void estimate_block_scores(const EstimateProblem& problem, const ParallelFor& parallel_for) {
  check_estimate(problem);
  if (problem.seqlen_k == 0) return;
  const Kernels& widest = kernels();
  const int64_t blocks = problem.num_q_blocks();
  const float nothing = problem.reduce == EstimateReduce::kMax ? -kInfinity : 0.0f;
  std::atomic<bool> out_of_memory{false};
  parallel_for(problem.batch * problem.num_heads * blocks, [&](int64_t begin, int64_t end) {
    try {
      Scratch scratch(problem);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t pair = item / blocks;
        std::fill(scratch.best.begin(), scratch.best.end(), nothing);
        BlockRow(problem, widest, scratch, pair / problem.num_heads, pair % problem.num_heads,
                 item % blocks)
            .run();
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace attnsieve::cpu
