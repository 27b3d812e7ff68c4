// cpu::quantize_blocks: rows -> symmetric integer codes and their scales, after the mean of the
// sequence is taken away.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "attnsieve/estimate.h"
#include "attnsieve/launch.h"
#include "kernels.h"

namespace attnsieve::cpu {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int32_t kInfinityBits = 0x7f800000;

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// One sequence and head.
struct Rows {
  const char* data;
  int64_t count;
  int64_t first;  // of the sequence, among the rows of its tensor
};

Rows rows_of(const QuantizeProblem& p, int64_t batch, int64_t head) {
  const KeyRange range = sequence_rows(p, batch);
  const int64_t offset =
      batch * p.x.stride_batch + head * p.x.stride_head + range.begin * p.x.stride_row;
  return {static_cast<const char*>(p.x.data) + offset * element_size(p.dtype),
          range.end - range.begin, range.begin};
}

void widen_rows(const QuantizeProblem& p, const Kernels& kernels, const Rows& rows, int64_t begin,
                int64_t count, float* dst) {
  kernels.widen(rows.data + begin * p.x.stride_row * element_size(p.dtype), p.dtype, p.x.stride_row,
                count, p.head_dim, dst);
}

// The sum of up to kSumRows rows in the order of estimate.h.
void sum_rows(const float* rows, int64_t count, int64_t head_dim, float* sum) {
  float lanes[kSumLanes][kMaxHeadDim];
  for (int lane = 0; lane < kSumLanes; ++lane) {
    std::fill(lanes[lane], lanes[lane] + head_dim, 0.0f);
    for (int64_t row = lane; row < count; row += kSumLanes) {
      for (int64_t d = 0; d < head_dim; ++d) lanes[lane][d] += rows[row * head_dim + d];
    }
  }
  std::memcpy(sum, lanes[0], head_dim * sizeof(float));
  for (int lane = 1; lane < kSumLanes; ++lane) {
    for (int64_t d = 0; d < head_dim; ++d) sum[d] += lanes[lane][d];
  }
}

void mean_of(const QuantizeProblem& p, const Kernels& kernels, const Rows& rows, float* mean) {
  const int64_t head_dim = p.head_dim;
  std::vector<float> chunk(kSumRows * head_dim);
  std::vector<float> sums((rows.count + kSumRows - 1) / kSumRows * head_dim);
  for (int64_t begin = 0; begin < rows.count; begin += kSumRows) {
    const int64_t count = min64(kSumRows, rows.count - begin);
    widen_rows(p, kernels, rows, begin, count, chunk.data());
    for (int64_t i = 0; i < count * head_dim; ++i) {
      if (!std::isfinite(chunk[i])) chunk[i] = 0.0f;
    }
    sum_rows(chunk.data(), count, head_dim, sums.data() + begin / kSumRows * head_dim);
  }
  int64_t left = static_cast<int64_t>(sums.size()) / head_dim;
  for (; left > 1; left = (left + kSumRows - 1) / kSumRows) {
    for (int64_t begin = 0; begin < left; begin += kSumRows) {
      const int64_t count = min64(kSumRows, left - begin);
      std::memcpy(chunk.data(), sums.data() + begin * head_dim, count * head_dim * sizeof(float));
      sum_rows(chunk.data(), count, head_dim, sums.data() + begin / kSumRows * head_dim);
    }
  }
  for (int64_t d = 0; d < head_dim; ++d)
    mean[d] = left == 0 ? 0.0f : sums[d] / static_cast<float>(rows.count);
}

struct Scale {
  float factor;  // of a number; 0 where all codes are
  float scale;
};

Scale scale_of(int32_t magnitude_bits, int32_t bits) {
  if (magnitude_bits >= kInfinityBits) return {0.0f, std::numeric_limits<float>::quiet_NaN()};
  float magnitude;
  std::memcpy(&magnitude, &magnitude_bits, sizeof magnitude);
  if (magnitude < kSmallestMagnitude) return {0.0f, 0.0f};
  const float largest = static_cast<float>(largest_code(bits));
  return {largest / magnitude, magnitude / largest};
}

void code_row(const float* row, int64_t head_dim, float factor, int8_t* codes) {
  if (factor == 0.0f) {
    std::memset(codes, 0, head_dim);
    return;
  }
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t d = 0; d < head_dim; ++d)
    codes[d] = static_cast<int8_t>(bits_of(row[d] * factor + kRounder) & 0xff);
}

void pack_row(const int8_t* codes, int64_t head_dim, uint8_t* packed) {
  for (int64_t d = 0; d < head_dim; d += 32) {
    for (int64_t i = 0; i < 16; ++i) {
      packed[d / 2 + i] = static_cast<uint8_t>((codes[d + i] & 15) << 4 | (codes[d + 16 + i] & 15));
    }
  }
}

// Rows that share scales.
void quantize_chunk(const QuantizeProblem& p, const Kernels& kernels, int64_t batch, int64_t head,
                    const Rows& rows, int64_t chunk, float* buffer) {
  const ScaleLayout layout = scale_layout(p.scale_rows, p.block_rows);
  const int64_t begin = chunk * layout.rows;
  const int64_t count = min64(layout.rows, rows.count - begin);
  widen_rows(p, kernels, rows, begin, count, buffer);
  const float* mean =
      p.mean == nullptr ? nullptr : p.mean + (batch * p.num_heads + head) * p.head_dim;
  int32_t magnitudes[kMaxScaleRows] = {};
  for (int64_t row = 0; row < count; ++row) {
    float* const numbers = buffer + row * p.head_dim;
    if (mean != nullptr) {
      for (int64_t d = 0; d < p.head_dim; ++d) numbers[d] -= mean[d];
    }
    int32_t greatest = 0;
    for (int64_t d = 0; d < p.head_dim; ++d) {
      const int32_t magnitude = bits_of(numbers[d]) & 0x7fffffff;
      greatest = magnitude > greatest ? magnitude : greatest;
    }
    int32_t& shared = magnitudes[layout.scale_of(p.scale_rows, static_cast<int32_t>(row))];
    shared = greatest > shared ? greatest : shared;
  }
  float factors[kMaxScaleRows];
  const bool packed = p.cu_seqlens != nullptr;
  const int64_t line = packed ? head : batch * p.num_heads + head;
  const int64_t first = packed ? first_chunk(batch, rows.first, layout.rows) : 0;
  float* const scales = p.scales + line * p.num_scales() + (first + chunk) * layout.scales;
  for (int32_t i = 0; i < layout.scales; ++i) {
    const Scale scale = scale_of(magnitudes[i], p.bits);
    factors[i] = scale.factor;
    scales[i] = scale.scale;
  }
  int8_t codes[kMaxHeadDim];
  if (p.smoothed.data != nullptr) {
    const HeadTensor& to = p.smoothed;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t offset = batch * to.stride_batch + head * to.stride_head +
                             (rows.first + begin + row) * to.stride_row;
      kernels.narrow(buffer + row * p.head_dim, p.dtype, p.head_dim,
                     static_cast<char*>(to.data) + offset * element_size(p.dtype));
    }
  }
  for (int64_t row = 0; row < count; ++row) {
    const int64_t offset = batch * p.codes.stride_batch + head * p.codes.stride_head +
                           (rows.first + begin + row) * p.codes.stride_row;
    char* const out = static_cast<char*>(p.codes.data) + offset;
    const float factor = factors[layout.scale_of(p.scale_rows, static_cast<int32_t>(row))];
    code_row(buffer + row * p.head_dim, p.head_dim, factor, codes);
    if (p.bits == 8) {
      std::memcpy(out, codes, p.head_dim);
    } else {
      pack_row(codes, p.head_dim, reinterpret_cast<uint8_t*>(out));
    }
  }
}

}  // namespace

void quantize_blocks(const QuantizeProblem& p, const ParallelFor& parallel_for) {
  check_quantize(p);
  const Kernels& widest = kernels();
  const int64_t pairs = p.batch * p.num_heads;
  const bool packed = p.cu_seqlens != nullptr;
  if (packed) std::fill(p.scales, p.scales + p.num_heads * p.num_scales(), 0.0f);
  std::atomic<bool> out_of_memory{false};
  const auto for_pairs = [&](auto&& body) {
    parallel_for(pairs, [&](int64_t begin, int64_t end) {
      try {
        for (int64_t pair = begin; pair < end; ++pair) body(pair / p.num_heads, pair % p.num_heads);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
    });
  };
  if (p.mean != nullptr) {
    for_pairs([&](int64_t batch, int64_t head) {
      mean_of(p, widest, rows_of(p, batch, head),
              p.mean + (batch * p.num_heads + head) * p.head_dim);
    });
  }
  const int64_t chunk_rows = scale_layout(p.scale_rows, p.block_rows).rows;
  const int64_t chunks = (p.seqlen + chunk_rows - 1) / chunk_rows;  // of a sequence, at most
  constexpr int64_t kPartRows = 1024;
  const int64_t part = kPartRows / chunk_rows;
  const int64_t parts = (chunks + part - 1) / part;
  parallel_for(pairs * parts, [&](int64_t begin, int64_t end) {
    try {
      std::vector<float> buffer(chunk_rows * p.head_dim);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t batch = item / parts / p.num_heads;
        const int64_t head = item / parts % p.num_heads;
        const Rows rows = rows_of(p, batch, head);
        const int64_t first = item % parts * part;
        const int64_t last = min64(first + part, (rows.count + chunk_rows - 1) / chunk_rows);
        for (int64_t chunk = first; chunk < last; ++chunk)
          quantize_chunk(p, widest, batch, head, rows, chunk, buffer.data());
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace attnsieve::cpu
