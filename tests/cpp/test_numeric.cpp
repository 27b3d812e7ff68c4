// The kernels one by one: 16-bit conversions (every float16, hard rounding cases), exp's error,
// packing and storing.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "attend_case.h"
#include "check.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// By definition, in exact arithmetic.
double value_of_float16(uint16_t h) {
  const int exponent = (h >> 10) & 31;
  const int mantissa = h & 1023;
  const double sign = h & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

double value_of_bfloat16(uint16_t h) { return as_float(static_cast<uint32_t>(h) << 16); }

uint16_t nearest_even(float x, double (*value_of)(uint16_t), uint16_t infinity) {
  if (std::isnan(x)) return 0xffff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::abs(static_cast<double>(x));
  uint16_t low =
      0;  // largest finite magnitude <= x, by bisection: codes are ordered like their values
  uint16_t high = infinity;
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (value_of(middle) <= magnitude ? low : high) = middle;
  }
  if (std::isinf(x)) return sign | infinity;
  const double below = value_of(low);
  const uint16_t last = infinity - 1;
  const double above = low == last ? 2 * value_of(last) - value_of(last - 1) : value_of(low + 1);
  const double up = above - magnitude;
  const double down = magnitude - below;
  const bool round_up = up < down || (up == down && (low & 1));
  return sign | static_cast<uint16_t>(low + round_up);
}

void check_format(const cpu::Kernels& kernels, DType dtype, double (*value_of)(uint16_t),
                  uint16_t infinity) {
  check::context = std::string(kernels.name) + " " + dtype_name(dtype);
  std::vector<uint16_t> codes(65536);
  for (int i = 0; i < 65536; ++i) codes[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(65536);
  kernels.widen(codes.data(), dtype, 0, 1, 65536, wide.data());
  std::vector<uint16_t> back(65536);
  kernels.narrow(wide.data(), dtype, 65536, back.data());
  bool exact = true;
  bool round_trip = true;
  for (int i = 0; i < 65536; ++i) {
    const double want = value_of(static_cast<uint16_t>(i));
    exact = exact && (std::isnan(want) ? std::isnan(wide[i])
                                       : wide[i] == want && std::signbit(wide[i]) == (i >> 15));
    round_trip =
        round_trip && (std::isnan(want) ? std::isnan(value_of(back[i])) : back[i] == codes[i]);
  }
  CHECK(exact);
  CHECK(round_trip);

  std::mt19937 rng(7);
  std::vector<float> hard;
  for (int i = 0; i < 40000; ++i) hard.push_back(as_float(rng()));
  for (uint32_t code = 0; code < infinity; code += 3) {  // exact ties and their neighbours
    const double middle =
        (value_of(static_cast<uint16_t>(code)) + value_of(static_cast<uint16_t>(code + 1))) / 2;
    if (!std::isfinite(middle)) continue;
    for (float x : {static_cast<float>(middle), std::nextafterf(static_cast<float>(middle), 0.0f),
                    std::nextafterf(static_cast<float>(middle), INFINITY)}) {
      hard.push_back(x);
      hard.push_back(-x);
    }
  }
  for (float x : {65519.0f, 65519.996f, 65520.0f, 65536.0f, 3.4028235e38f, INFINITY, -INFINITY, NAN,
                  0.0f, -0.0f}) {
    hard.push_back(x);
  }
  std::vector<uint16_t> got(hard.size());
  kernels.narrow(hard.data(), dtype, static_cast<int64_t>(hard.size()), got.data());
  int wrong = 0;
  for (size_t i = 0; i < hard.size(); ++i) {
    if (std::isnan(hard[i]) ? !std::isnan(value_of(got[i]))
                            : got[i] != nearest_even(hard[i], value_of, infinity)) {
      ++wrong;
    }
  }
  CHECK(wrong == 0);
  for (int64_t count = 0; count < 40; ++count) {  // tails write exactly `count` elements
    std::vector<uint16_t> short_codes(count, 0x3c00);
    std::vector<float> short_wide(count);
    kernels.widen(short_codes.data(), dtype, 0, 1, count, short_wide.data());
    kernels.narrow(short_wide.data(), dtype, count, short_codes.data());
    CHECK(count == 0 || short_codes[count - 1] == 0x3c00);
  }
}

// softmax() with row_max already at 0 leaves exp(s) in the tile.
void exponential(const cpu::Kernels& kernels) {
  check::context = std::string(kernels.name) + " exp";
  double worst = 0.0;
  std::vector<float> tile(cpu::kColumns), max(cpu::kColumns), sum(cpu::kColumns),
      rescale(cpu::kColumns);
  auto exp_of = [&](const std::vector<float>& x) {
    tile = x;
    std::fill(max.begin(), max.end(), 0.0f);
    std::fill(sum.begin(), sum.end(), 1.0f);
    kernels.softmax(tile.data(), 1, cpu::kColumns, max.data(), sum.data(), rescale.data());
  };
  std::vector<float> x(cpu::kColumns);
  for (int i = 0; i < 40000; ++i) {
    for (int c = 0; c < cpu::kColumns; ++c)
      x[c] = -87.33f * static_cast<float>(i * cpu::kColumns + c) / 2560000.0f;
    exp_of(x);
    for (int c = 0; c < cpu::kColumns; ++c) {
      const double want = std::exp(static_cast<double>(x[c]));
      worst = std::max(worst, std::abs(tile[c] - want) / want);
    }
  }
  std::printf("exp %s: largest relative error %.3g\n", kernels.name, worst);
  CHECK(worst < 1.2e-7);
  std::fill(x.begin(), x.end(), 0.0f);
  x[1] = -INFINITY;
  x[2] = -88.0f;
  x[3] = -1e30f;
  x[4] = NAN;
  x[5] = -1e-30f;
  exp_of(x);
  CHECK(tile[0] == 1.0f && tile[1] == 0.0f && tile[2] == 0.0f && tile[3] == 0.0f &&
        tile[5] == 1.0f);
  CHECK(std::isnan(tile[4]) && std::isnan(sum[4]) && std::isnan(max[4]));
  CHECK(rescale[0] == 1.0f && sum[0] == 2.0f && sum[1] == 1.0f);
}

void rows_without_keys(const cpu::Kernels& kernels) {
  check::context = std::string(kernels.name) + " softmax of -inf";
  std::vector<float> tile(3 * cpu::kColumns, -INFINITY), max(cpu::kColumns, -INFINITY),
      sum(cpu::kColumns, 0.0f), rescale(cpu::kColumns, 5.0f);
  kernels.softmax(tile.data(), 3, cpu::kColumns, max.data(), sum.data(), rescale.data());
  CHECK(max[0] == -INFINITY && sum[0] == 0.0f && tile[0] == 0.0f && rescale[0] == 0.0f);
}

void max_keeps_nan(const cpu::Kernels& kernels) {
  check::context = std::string(kernels.name) + " max";
  for (int where : {0, 1, 4}) {
    std::vector<float> tile(5 * cpu::kColumns, -1.0f), max(cpu::kColumns, -INFINITY);
    tile[where * cpu::kColumns + 9] = NAN;
    tile[2 * cpu::kColumns + 10] = 3.0f;
    kernels.max_over_keys(tile.data(), 5, cpu::kColumns, max.data());
    CHECK(std::isnan(max[9]) && max[10] == 3.0f && max[11] == -1.0f);
    kernels.max_over_keys(tile.data() + 3 * cpu::kColumns, 1, cpu::kColumns, max.data());
    CHECK(std::isnan(max[9]) && max[10] == 3.0f);
  }
}

}  // namespace

int main() {
  for (const cpu::Kernels* kernels : all_kernels()) {
    check_format(*kernels, DType::kFloat16, value_of_float16, 0x7c00);
    check_format(*kernels, DType::kBFloat16, value_of_bfloat16, 0x7f80);
    exponential(*kernels);
    rows_without_keys(*kernels);
    max_keeps_nan(*kernels);
  }
  return check::finish();
}
