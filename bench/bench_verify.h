// Sampled rows of a result against the definition in double precision.
#pragma once

#include <cstdint>
#include <vector>

#include "bench_case.h"

namespace attnsieve::bench {

struct Verification {
  int64_t rows = 0;         // query rows compared
  double worst_out = 0.0;   // largest |out - expected| / bound
  double worst_lse = 0.0;   // the same for lse
  bool ok() const { return rows > 0 && worst_out <= 1.0 && worst_lse <= 1.0; }
};

// `out` and `lse` as a call wrote them, on the host.
Verification verify(const BenchCase& bench_case, const BenchInputs& inputs,
                    const std::vector<uint8_t>& out, const std::vector<float>& lse);

}  // namespace attnsieve::bench
