// cpu::estimate_block_scores: maxima of low-bit scores over the pairs of a q-block and a KV block, or
// sums of their exponentials.
//
// Products are exact whoever computes them: integer dot products, or the float32 micro-kernels of
// attention, as codes are small. Sampled query rows, of one q-block or of as many as fit, are the
// columns of the transposed tiles of kernels.h. Keys of a tile are ordered by cell, the keys of a KV
// block that share a scale: a cell has one maximum a row, and one product of scales.
#include "attnsieve/estimate.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "attnsieve/launch.h"
#include "code_products.h"
#include "kernels.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kTileKeys = 128;

float max_nan(float a, float b) { return std::isnan(a) || a > b ? a : b; }

// `count` codes of a row.
template <class T>
void widen_codes(const CodedRows& rows, const char* row, int64_t count, T* dst) {
  if (rows.bits == 8) {
    const auto* codes = reinterpret_cast<const int8_t*>(row);
    for (int64_t d = 0; d < count; ++d) dst[d] = codes[d];
    return;
  }
  for (int64_t d = 0; d < count; d += 32) {
    for (int64_t i = 0; i < 16; ++i) {
      const auto byte = static_cast<int8_t>(row[d / 2 + i]);
      dst[d + i] = static_cast<T>(byte >> 4);
      dst[d + 16 + i] = static_cast<T>(static_cast<int8_t>(byte << 4) >> 4);
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

// A key of a tile, and its block and scale relative to the tile's first.
struct Place {
  int64_t block, scale;
  int key;
  bool operator<(const Place& other) const {
    if (block != other.block) return block < other.block;
    return scale != other.scale ? scale < other.scale : key < other.key;
  }
};

// Sampled rows of a q-block, and how many q-blocks are estimated together.
int64_t rows_of_block(const EstimateProblem& p) { return p.block_q / p.row_stride; }
int64_t blocks_together(const EstimateProblem& p) { return max64(kColumns / rows_of_block(p), 1); }

struct Scratch {
  int pitch;  // of codes
  const CodeProducts* integers;
  std::vector<float> query_t, keys, scores;
  std::vector<uint8_t> query_codes;
  std::vector<int8_t> key_codes;
  std::vector<Place> order;  // of a tile's keys
  std::vector<Cell> cells;
  float row_factor[kColumns] = {};
  float threshold[kColumns] = {};
  KeyRange visible[kColumns];
  std::vector<float> best;  // of each q-block and KV block: the maximum, or the sum

  Scratch(const EstimateProblem& problem, const CodeProducts* integers)
      : pitch(static_cast<int>((problem.head_dim + kCodePitch - 1) / kCodePitch * kCodePitch)),
        integers(integers),
        scores(kTileKeys * kColumns),
        order(kTileKeys),
        best(blocks_together(problem) * problem.num_k_blocks()) {
    cells.reserve(kTileKeys);
    if (integers != nullptr) {
      query_codes.resize(pitch * kColumns);
      key_codes.resize(kTileKeys * pitch);
    } else {
      query_t.resize(problem.head_dim * kColumns);
      keys.resize(kTileKeys * problem.head_dim);
    }
    for (int i = 0; i < kTileKeys; ++i)
      order[i] = {i / problem.block_k, scale_index(problem.k, i), i};
    std::sort(order.begin(), order.end());
  }
};

// The q-blocks of a head that are estimated together.
class BlockRows {
 public:
  BlockRows(const EstimateProblem& problem, const Kernels& kernels, Scratch& scratch, int64_t batch,
            int64_t head, int64_t first_block)
      : p_(problem),
        kernels_(kernels),
        scratch_(scratch),
        sequence_(sequence_of(problem, batch)),
        batch_(batch),
        head_(head),
        first_block_(first_block),
        num_blocks_(min64(blocks_together(problem), problem.num_q_blocks() - first_block)),
        key_scale_(problem.k.bits == 4 ? kNibbleScale : 1.0f),
        key_factor_(1.0f / key_scale_) {}

  void run() {
    const int64_t begin = first_block_ * p_.block_q;
    const int64_t end = min64(begin + num_blocks_ * p_.block_q, sequence_.seqlen_q);
    const int64_t step = int64_t{kColumns} * p_.row_stride;
    for (int64_t row = begin; row < end; row += step) add_rows(row, min64(row + step, end));
    store();
  }

 private:
  // The results of the q-block of a row under way.
  float* best_of(int row) { return scratch_.best.data() + block_of_[row] * p_.num_k_blocks(); }

  void store() const {
    const int64_t blocks = p_.num_k_blocks();
    const int64_t line = (batch_ * p_.num_heads + head_) * p_.num_q_blocks() + first_block_;
    const float* best = scratch_.best.data();
    if (p_.scores != nullptr) {
      std::copy_n(best, num_blocks_ * blocks, p_.scores + line * blocks);
      return;
    }
    const int64_t words = (blocks + 31) / 32;
    std::fill_n(p_.bits + line * words, num_blocks_ * words, 0u);
    for (int64_t i = 0; i < num_blocks_; ++i) {
      for (int64_t b = 0; b < blocks; ++b) {
        const uint32_t keep = !(best[i * blocks + b] <= 0.0f);
        p_.bits[(line + i) * words + b / 32] |= keep << (b % 32);
      }
    }
  }

  // Sampled rows of [begin, end), at most kColumns.
  void add_rows(int64_t begin, int64_t end) {
    rows_ = static_cast<int>((end - begin + p_.row_stride - 1) / p_.row_stride);
    const int lanes = scratch_.integers == nullptr ? kernels_.lanes : 16;
    columns_ = (rows_ + lanes - 1) / lanes * lanes;
    KeyRange all{sequence_.num_keys, 0};
    std::fill(scratch_.query_t.begin(), scratch_.query_t.end(), 0.0f);
    std::fill(scratch_.query_codes.begin(), scratch_.query_codes.end(), uint8_t{128});
    int8_t codes[256];
    const float* scales = sequence_.q_scales + head_ * p_.q.num_scales;
    for (int i = 0; i < rows_; ++i) {
      const int64_t row = begin + i * p_.row_stride;
      const char* const row_codes =
          sequence_.q_codes + head_ * p_.q.codes.stride_head + row * p_.q.codes.stride_row;
      widen_codes(p_.q, row_codes, p_.head_dim, codes);
      for (int64_t d = 0; d < p_.head_dim; ++d) {
        if (scratch_.integers == nullptr) {
          scratch_.query_t[d * kColumns + i] = codes[d];
        } else {
          scratch_.query_codes[(d / 4 * kColumns + i) * 4 + d % 4] =
              static_cast<uint8_t>(codes[d] + 128);
        }
      }
      block_of_[i] = row / p_.block_q - first_block_;
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
    if (scratch_.integers != nullptr) {
      scratch_.integers->products(scratch_.query_codes.data(), scratch_.key_codes.data(), keys,
                                  scratch_.pitch, columns_, scores);
    } else {
      kernels_.scores(scratch_.query_t.data(), scratch_.keys.data(), p_.head_dim, keys,
                      static_cast<int>(p_.head_dim), 1.0f, columns_, scores);
    }
    hide(begin, end, scores);
    if (p_.reduce == EstimateReduce::kMax) return add_maxima(scores);
    const auto& cells = scratch_.cells;
    for (size_t first = 0, next = 0; first < cells.size(); first = next) {
      while (next < cells.size() && cells[next].block == cells[first].block) ++next;
      add_sums(scores, first, next);
    }
  }

  void add_maxima(const float* scores) {
    const auto& cells = scratch_.cells;
    float maxima[kColumns];
    float best[kColumns];
    for (size_t c = 0; c < cells.size(); ++c) {
      if (c == 0 || cells[c].block != cells[c - 1].block) std::fill_n(best, kColumns, -kInfinity);
      std::fill_n(maxima, kColumns, -kInfinity);
      kernels_.max_over_keys(scores + cells[c].begin * kColumns, cells[c].end - cells[c].begin,
                             columns_, maxima);
      for (int i = 0; i < kColumns; ++i) {
        const float value = value_of(maxima[i], i, cells[c]);
        // Rows that see none of the keys have no value; a NaN is the greatest.
        const bool greater = !(value <= best[i]) && best[i] == best[i];
        best[i] = maxima[i] != -kInfinity && greater ? value : best[i];
      }
      if (c + 1 < cells.size() && cells[c + 1].block == cells[c].block) continue;
      for (int i = 0; i < rows_; ++i) {
        float& all = best_of(i)[cells[c].block];
        all = max_nan(best[i], all);
      }
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
    for (int i = 0; i < rows_; ++i) {
      if (row_max[i] == -kInfinity) continue;
      best_of(i)[cells[first].block] +=
          row_max[i] == kInfinity ? kInfinity : row_sum[i] * std::exp(row_max[i]);
    }
  }

  float value_of(float dot, int row, const Cell& cell) const {
    const float factor = scratch_.row_factor[row] * cell.scale;
    const float value = dot * key_factor_ * factor;
    return value - scratch_.threshold[row];
  }

  // Codes of the tile's keys, ordered by cell, and the cells.
  void load_keys(int64_t begin, int64_t end) {
    const int64_t kv_head = head_ / (p_.num_heads / p_.num_kv_heads);
    const int64_t first_scale = scale_index(p_.k, begin);
    const float* scales = sequence_.k_scales + kv_head * p_.k.num_scales + first_scale;
    const char* const codes = sequence_.k_codes + kv_head * p_.k.codes.stride_head;
    scratch_.cells.clear();
    int count = 0;
    const Place* last = nullptr;
    for (const Place& place : scratch_.order) {
      if (begin + place.key >= end) continue;
      order_[count] = begin + place.key;
      const char* const row = codes + order_[count] * p_.k.codes.stride_row;
      if (scratch_.integers != nullptr) {
        int8_t* const to = scratch_.key_codes.data() + count * scratch_.pitch;
        if (p_.k.bits == 4) {
          scratch_.integers->unpack(row, p_.head_dim, to);
        } else {
          std::memcpy(to, row, p_.head_dim);
        }
      } else {
        widen_codes(p_.k, row, p_.head_dim, scratch_.keys.data() + count * p_.head_dim);
      }
      if (last == nullptr || place.block != last->block || place.scale != last->scale) {
        scratch_.cells.push_back(
            {count, count, begin / p_.block_k + place.block, scales[place.scale] * key_scale_});
      }
      scratch_.cells.back().end = ++count;
      last = &place;
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
  int64_t first_block_;
  int64_t num_blocks_;
  float key_scale_;  // codes of 4 bits count 1 / kNibbleScale times, their scales as much less
  float key_factor_;
  int64_t block_of_[kColumns] = {};  // of the rows under way, from first_block_ on
  int rows_ = 0;
  int columns_ = 0;
  int64_t order_[kTileKeys];
};

}  // namespace

void estimate_block_scores(const EstimateProblem& problem, const ParallelFor& parallel_for) {
  estimate_block_scores(problem, parallel_for, code_products());
}

void estimate_block_scores(const EstimateProblem& problem, const ParallelFor& parallel_for,
                           const CodeProducts* integers) {
  check_estimate(problem);
  if (problem.seqlen_k == 0) return;
  const Kernels& widest = kernels();
  const int64_t together = blocks_together(problem);
  const int64_t parts = (problem.num_q_blocks() + together - 1) / together;
  const float nothing = problem.reduce == EstimateReduce::kMax ? -kInfinity : 0.0f;
  std::atomic<bool> out_of_memory{false};
  parallel_for(problem.batch * problem.num_heads * parts, [&](int64_t begin, int64_t end) {
    try {
      Scratch scratch(problem, integers);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t pair = item / parts;
        std::fill(scratch.best.begin(), scratch.best.end(), nothing);
        BlockRows(problem, widest, scratch, pair / problem.num_heads, pair % problem.num_heads,
                  item % parts * together)
            .run();
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace attnsieve::cpu
