// One-byte elements of caches to and from float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attnsieve/tensor_view.h"
#include "kernels.h"

namespace attnsieve::cpu {

inline int64_t element_size(DType dtype, Code code) {
  return code == Code::kNone ? element_size(dtype) : 1;
}

// float8 e4m3fn: exponent bias 7, no infinity, 0x7f and 0xff are NaN, the largest number is 448.
inline float widen_e4m3(uint8_t code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if ((code & 0x7f) == 0x7f) magnitude = std::numeric_limits<float>::quiet_NaN();
  return code & 0x80 ? -magnitude : magnitude;
}

// To nearest even; numbers beyond 448 become 448, NaN stays NaN.
inline uint8_t narrow_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7f;
  if (bits >= 0x43e00000u) return sign | 0x7e;  // 448
  if (bits < 0x3c800000u) {  // 2^-6: adding 2^14 rounds at the subnormal's last bit, 2^-9
    const float shifted = std::fabs(x) + 16384.0f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return sign | static_cast<uint8_t>(bits - 0x46800000u);
  }
  const uint32_t rounded = (bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20;
  return sign | static_cast<uint8_t>(rounded - (120u << 3));
}

// All 256 numbers, filled once.
inline const float* e4m3_numbers() {
  struct Table {
    Table() {
      for (int code = 0; code < 256; ++code) number[code] = widen_e4m3(static_cast<uint8_t>(code));
    }
    float number[256];
  };
  static const Table table;
  return table.number;
}

// `count` elements that lie side by side, of `dtype` or of a code, to float32.
inline void widen_elements(const Kernels& kernels, const void* src, DType dtype, Code code,
                           int64_t count, float* dst) {
  if (code == Code::kNone) {
    kernels.widen(src, dtype, 0, 1, count, dst);
  } else if (code == Code::kInt8) {
    for (int64_t i = 0; i < count; ++i) dst[i] = static_cast<const int8_t*>(src)[i];
  } else {
    const float* const number = e4m3_numbers();
    for (int64_t i = 0; i < count; ++i) dst[i] = number[static_cast<const uint8_t*>(src)[i]];
  }
}

}  // namespace attnsieve::cpu
