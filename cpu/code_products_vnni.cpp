// Flags: -mavx512f -mavx512bw -mavx512vl -mavx512vnni (see cpu/README.md). Without them they
// are left out.
#include "code_products.h"
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>

#include <cstring>

namespace attnsieve::cpu::vnni {
namespace {

// 128 times the sum of a key's codes: what 128 in every code of a query adds.
int32_t excess(const int8_t* key, int pitch) {
  __m512i sum = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int d = 0; d < pitch; d += 64)
    sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(key + d));
  int32_t parts[16];
  _mm512_storeu_si512(parts, sum);
  int32_t all = 0;
  for (const int32_t part : parts) all += part;
  return 128 * all;
}

template <int kVecs, int kKeys>
void block(const uint8_t* queries, const int8_t* keys, int pitch, float* s) {
  __m512i sums[kKeys][kVecs];
  for (int k = 0; k < kKeys; ++k) {
    const __m512i start = _mm512_set1_epi32(-excess(keys + k * pitch, pitch));
    for (int v = 0; v < kVecs; ++v) sums[k][v] = start;
  }
  for (int d = 0; d < pitch; d += 4) {
    __m512i own[kVecs];
    for (int v = 0; v < kVecs; ++v)
      own[v] = _mm512_loadu_si512(queries + (d / 4 * kColumns + v * 16) * 4);
    for (int k = 0; k < kKeys; ++k) {
      int32_t four;
      std::memcpy(&four, keys + k * pitch + d, sizeof(four));
      const __m512i key = _mm512_set1_epi32(four);
      for (int v = 0; v < kVecs; ++v) sums[k][v] = _mm512_dpbusd_epi32(sums[k][v], own[v], key);
    }
  }
  for (int k = 0; k < kKeys; ++k) {
    for (int v = 0; v < kVecs; ++v)
      _mm512_storeu_ps(s + k * kColumns + v * 16, _mm512_cvtepi32_ps(sums[k][v]));
  }
}

template <int kVecs>
void all(const uint8_t* queries, const int8_t* keys, int count, int pitch, float* s) {
  int key = 0;
  for (; key + 4 <= count; key += 4)
    block<kVecs, 4>(queries, keys + key * pitch, pitch, s + key * kColumns);
  for (; key < count; ++key)
    block<kVecs, 1>(queries, keys + key * pitch, pitch, s + key * kColumns);
}

void products(const uint8_t* queries, const int8_t* keys, int count, int pitch, int columns,
              float* s) {
  switch (columns / 16) {
    case 1: return all<1>(queries, keys, count, pitch, s);
    case 2: return all<2>(queries, keys, count, pitch, s);
    case 3: return all<3>(queries, keys, count, pitch, s);
    default: return all<4>(queries, keys, count, pitch, s);
  }
}

// 16 bytes hold 32 codes: the first 16 in their upper halves.
void unpack(const char* row, int64_t count, int8_t* codes) {
  const __m128i nibble = _mm_set1_epi8(15);
  const __m256i sign = _mm256_set1_epi8(8);
  for (int64_t d = 0; d < count; d += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + d / 2));
    const __m128i upper = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
    const __m256i all = _mm256_set_m128i(_mm_and_si128(bytes, nibble), upper);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + d),
                        _mm256_sub_epi8(_mm256_xor_si256(all, sign), sign));
  }
}

constexpr CodeProducts kFunctions = {products, unpack};

}  // namespace

extern const CodeProducts* const kTable;
const CodeProducts* const kTable = &kFunctions;

}  // namespace attnsieve::cpu::vnni
#else
namespace attnsieve::cpu::vnni {
extern const CodeProducts* const kTable;
const CodeProducts* const kTable = nullptr;
}  // namespace attnsieve::cpu::vnni
#endif
