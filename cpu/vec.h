// Vec: the widest float vector of the instruction set this file is compiled for, written with the
// vector extensions of GCC and Clang so that one source serves SSE2, AVX2, AVX-512 and every other
// machine.
//
// Only for kernels_body.h: each including file is compiled with different flags, so everything here
// sits in an unnamed namespace (no symbol may be shared with a file that has other flags), and no
// std:: template is used.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace attnsieve::cpu {
namespace {

// kPanelVecs x kBlockRows accumulators, kPanelVecs operands and one broadcast have to fit the
// vector registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kPanelVecs = 4;
constexpr int kBlockRows = 6;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kPanelVecs = 2;
constexpr int kBlockRows = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kPanelVecs = 4;
constexpr int kBlockRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kPanelVecs = 2;
constexpr int kBlockRows = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));

// memcpy: unaligned and free of aliasing trouble; compilers turn it into one instruction.
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// 0 + x: the sign of a zero is lost, which no caller sees.
inline Vec broadcast(float x) { return Vec{} + x; }

inline BitVec bits(Vec v) {
  BitVec b;
  std::memcpy(&b, &v, sizeof b);
  return b;
}

inline Vec from_bits(BitVec b) {
  Vec v;
  std::memcpy(&v, &b, sizeof v);
  return v;
}

constexpr float kInfinity = __builtin_inff();

// exp(x) for x <= 0, -inf or NaN. Cephes' expf polynomial: relative error below 1.2e-7 (one ulp;
// 8.4e-8 measured by test_numeric.cpp), exactly 1 at 0, NaN for NaN, exactly 0 below kExpUnderflow,
// so no result is subnormal.
constexpr float kExpUnderflow = -87.33654f;

inline Vec exp_nonpositive(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
  const Vec shifter = broadcast(12582912.0f);
  const Vec clamped = x < kExpUnderflow ? broadcast(kExpUnderflow) : x;
  const Vec shifted = clamped * 1.44269504088896341f + shifter;
  const Vec n = shifted - shifter;
  // ln 2 in two parts; the first has few bits, so n times it is exact.
  Vec r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec poly = broadcast(1.9875691500e-4f);
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  // A multiplication, not an addition to the exponent bits: NaN has to stay NaN.
  const Vec power = from_bits((bits(shifted) - bits(shifter) + 127u) << 23);
  const Vec result = poly * power;
  return x < kExpUnderflow ? Vec{} : result;
}

// ---- 16-bit formats. Rounding is to nearest even; NaN stays NaN (quiet).

inline Vec widen_bfloat16(HalfBits h) {
  return from_bits(__builtin_convertvector(h, BitVec) << 16);
}

inline HalfBits narrow_bfloat16(Vec v) {
  const BitVec b = bits(v);
  const BitVec rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const BitVec quiet = (b >> 16) | 0x40u;
  return __builtin_convertvector(v != v ? quiet : rounded, HalfBits);
}

inline Vec widen_float16(HalfBits h) {
#if defined(__AVX512F__)
  __m256i packed;
  std::memcpy(&packed, &h, sizeof packed);
  return _mm512_maskz_cvtph_ps(0xffff, packed);  // unmasked, GCC 12 warns of an uninitialised value
#elif defined(__F16C__)
  __m128i packed;
  std::memcpy(&packed, &h, sizeof packed);
  return _mm256_cvtph_ps(packed);
#else
  const BitVec wide = __builtin_convertvector(h, BitVec);
  const BitVec sign = (wide & 0x8000u) << 16;
  const BitVec magnitude = (wide & 0x7fffu) << 13;
  // One exact multiplication by 2^112 moves the exponent bias from 15 to 127 and normalises
  // subnormals.
  const BitVec scaled = bits(from_bits(magnitude) * 5.192296858534828e33f);
  const BitVec special = magnitude | 0x7f800000u;  // exponent field 31: Inf or NaN
  return from_bits(sign | (magnitude >= 0x0f800000u ? special : scaled));
#endif
}

inline HalfBits narrow_float16(Vec v) {
  const BitVec b = bits(v);
  const BitVec sign = b & 0x80000000u;
  const BitVec magnitude = b ^ sign;
  const BitVec overflow = magnitude > 0x7f800000u ? BitVec{} + 0x7e00u : BitVec{} + 0x7c00u;
  // Below 2^-14: adding 0.5 makes the FPU round at the subnormal's last bit (2^-24).
  const BitVec subnormal = bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  // Exponent bias 127 -> 15 and rounding in one addition.
  const BitVec normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  BitVec half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? overflow : half;
  return __builtin_convertvector(half | (sign >> 16), HalfBits);
}

inline HalfBits load_half(const uint16_t* p) {
  HalfBits h;
  std::memcpy(&h, p, sizeof h);
  return h;
}

inline void store_half(uint16_t* p, HalfBits h) { std::memcpy(p, &h, sizeof h); }

}  // namespace
}  // namespace attnsieve::cpu
