// A warp's 32 units, one a lane, against the query vectors of an item: elements, weights, and the
// reduction over rows. Vectors go through a tile of 16 at a time.
#pragma once

#include "cuda/sm80/proxy_scores/fragments.cuh"

namespace attnsieve::sm80 {

// In the order they are reduced: output rows, their heads, then the rows that become one.
struct QueryVectors {
  int first_row;
  int rows;
  int first_head;
  int heads;
  int merged;

  __device__ int count() const { return rows * heads * merged; }
  __device__ int row_of(int v) const { return first_row + v / (heads * merged) + v % merged; }
  __device__ int head_of(int v) const { return first_head + v / merged % heads; }
};

// [vector][unit]; the padding spreads the lanes that store MMA results over the banks.
struct ScoreTile {
  float score[kScoreTileVectors][kScoreTileUnits + 4];
};

template <class Element>
class UnitScores {
  static constexpr bool kMma = sizeof(Element) == 2;
  static constexpr int kRows = 4;  // of the MMA operands, per lane: units lane / 4 + 8 i

 public:
  __device__ UnitScores(const ProxyScoresArguments& a, int batch, ScoreTile& tile)
      : a_(a), p_(a.problem), batch_(batch), tile_(tile) {}

  // The lane's unit.
  __device__ void set_unit(const UnitPlace& place, int first_row) {
    exists_ = place.outer >= 0;
    first_row_ = first_row;
    place_ = place;
  }

  // Calls on_head(output row, head, score, sees) for every lane's unit, in the vectors' order.
  // The lane's row or, reduced, some row sees the unit where `sees`; `score` has no meaning
  // elsewhere.
  template <class OnHead>
  __device__ void for_each_head(const QueryVectors& vectors, OnHead&& on_head) {
    const int count = vectors.count();
    const int last_head = vectors.first_head + vectors.heads;
    int row = vectors.first_row;
    int head = vectors.first_head;
    int merged = 0;
    double sum = 0.0;
    bool sees = false;
    for (int first = 0; first < count;) {
      // The vectors of a block read one key head.
      const int key_head = head / a_.plan.heads_per_key;
      const int heads_end = min(last_head, (key_head + 1) * a_.plan.heads_per_key);
      int block = min(kScoreTileVectors, count - first);
      if (heads_end < last_head || vectors.first_head < key_head * a_.plan.heads_per_key) {
        block = min(block, (heads_end - head) * vectors.merged - merged);
      }
      multiply(vectors, first, block, key_head);
      __syncwarp();
      for (int i = 0; i < block; ++i) {
        const int query_row = row + merged;
        if (exists_ && query_row >= first_row_) {
          const double x = element(i, head, query_row);
          sum = sees ? combine(p_.row_reduce, sum, x) : x;
          sees = true;
        }
        if (++merged < vectors.merged) continue;
        float score = static_cast<float>(sum);
        if (p_.row_reduce == Reduction::kMean) {
          score /= static_cast<float>(vectors.merged - first_row_);
        }
        on_head(row, head, score, sees);
        merged = 0;
        sees = false;
        if (++head < last_head) continue;
        head = vectors.first_head;
        ++row;
      }
      __syncwarp();
      first += block;
    }
  }

 private:
  __device__ float element(int i, int head, int row) const {
    float x = tile_.score[i][lane_index()] * p_.score_scale;
    if (p_.element == ProxyElement::kReluDot) x = x < 0.0f ? 0.0f : x;
    const RowTensor& weights = p_.head_weights;
    if (weights.data == nullptr) return x;
    return x * weights.data[batch_ * weights.stride_batch + head * weights.stride_head +
                            row * weights.stride_row];
  }

  __device__ int sides() const { return p_.element == ProxyElement::kBounds ? 2 : 1; }

  template <class Tensor>
  __device__ int64_t offset_in(const Tensor& tensor, int key_head) const {
    return place_.outer * tensor.stride_batch + key_head * tensor.stride_head +
           place_.row * tensor.stride_row;
  }

  __device__ float key_scale(int key_head, int side) const {
    if (p_.key_scale.data == nullptr || !exists_) return 1.0f;
    return p_.key_scale.data[offset_in(p_.key_scale, key_head) + side * p_.key_scale_stride_bound];
  }

  __device__ const Element* query(const QueryVectors& vectors, int v) const {
    return static_cast<const Element*>(p_.q.data) + batch_ * p_.q.stride_batch +
           vectors.head_of(v) * p_.q.stride_head + vectors.row_of(v) * p_.q.stride_row;
  }

  // tile[i] = key . vector first + i, or the parts of it over both bounds.
  __device__ void multiply(const QueryVectors& vectors, int first, int count, int key_head) {
    if constexpr (kMma) {
      if (count > 8) {
        multiply_mma<2>(vectors, first, count, key_head);
      } else {
        multiply_mma<1>(vectors, first, count, key_head);
      }
    } else {
      if (!exists_) return;
      for (int i = 0; i < count; ++i) {
        tile_.score[i][lane_index()] = dot(query(vectors, first + i), key_head);
      }
    }
  }

  template <int kColumnTiles>
  __device__ void multiply_mma(const QueryVectors& vectors, int first, int count, int key_head) {
    const int lane = lane_index();
    const int64_t own = exists_ ? offset_in(p_.keys, key_head) : -1;
    int64_t offset[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) offset[i] = __shfl_sync(kAllLanes, own, lane / 4 + 8 * i);
    const Element* source[kColumnTiles];
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const int v = n * 8 + lane / 4;
      source[n] = v < count ? query(vectors, first + v) : nullptr;
    }
    float sums[kRows / 2][kColumnTiles][4] = {};
    const int pieces = static_cast<int>(p_.head_dim) / 8;
    for (int side = 0; side < sides(); ++side) {
      const float own_scale = key_scale(key_head, side);
      float scale[kRows / 2][2];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        scale[i / 2][i % 2] = __shfl_sync(kAllLanes, own_scale, lane / 4 + 8 * i);
      }
      const int64_t side_offset = side * p_.keys_stride_bound;
#pragma unroll 2
      for (int piece = lane % 4; piece - lane % 4 < pieces; piece += 4) {
        uint4 keys[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          keys[i] = piece < pieces && offset[i] >= 0
                        ? load_key_piece<Element>(a_, offset[i] + side_offset + piece * 8)
                        : no_piece();
        }
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          uint4 x = piece < pieces && source[n] != nullptr
                        ? __ldg(reinterpret_cast<const uint4*>(source[n]) + piece)
                        : no_piece();
          if (p_.element == ProxyElement::kBounds) x = part_of<Element>(x, side);
#pragma unroll
          for (int m = 0; m < kRows / 2; ++m) {
            float products[4];
            multiply_pieces<Element>(keys[2 * m], keys[2 * m + 1], x, products);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums[m][n][i] = fmaf(products[i], scale[m][i / 2], sums[m][n][i]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRows / 2; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = n * 8 + lane % 4 * 2 + i % 2;
          tile_.score[column][m * 16 + i / 2 * 8 + lane / 4] = sums[m][n][i];
        }
      }
    }
  }

  // float32: the lane's own key. Eight sums side by side round less than one.
  __device__ float dot(const Element* vector, int key_head) const {
    float total = 0.0f;
    const int64_t offset = offset_in(p_.keys, key_head);
    for (int side = 0; side < sides(); ++side) {
      float sums[8] = {};
      for (int d = 0; d < p_.head_dim; d += 8) {
        float key[8];
        load_floats(offset + side * p_.keys_stride_bound + d, key);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float x = vector[d + i];
          if (p_.element == ProxyElement::kBounds) {
            x = side == 0 ? (x > 0.0f ? 0.0f : x) : (x < 0.0f ? 0.0f : x);
          }
          sums[i] = fmaf(x, key[i], sums[i]);
        }
      }
      const float sum =
          ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
      total = fmaf(sum, key_scale(key_head, side), total);
    }
    return total;
  }

  __device__ void load_floats(int64_t offset, float (&key)[8]) const {
    if (p_.key_code == Code::kNone) {
      const auto* source =
          reinterpret_cast<const float4*>(static_cast<const float*>(p_.keys.data) + offset);
      const float4 halves[2] = {__ldg(source), __ldg(source + 1)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        key[4 * i] = halves[i].x;
        key[4 * i + 1] = halves[i].y;
        key[4 * i + 2] = halves[i].z;
        key[4 * i + 3] = halves[i].w;
      }
      return;
    }
    const uint2 codes = load_codes(a_, offset);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      key[i] = number_of(p_.key_code, (i < 4 ? codes.x : codes.y) >> (8 * (i % 4)) & 0xff);
    }
  }

  const ProxyScoresArguments& a_;
  const ProxyScoresProblem& p_;
  int batch_;
  ScoreTile& tile_;
  bool exists_ = false;
  int first_row_ = 0;
  UnitPlace place_{-1, 0};
};

}  // namespace attnsieve::sm80
