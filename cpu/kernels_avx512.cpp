// Flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c (see cpu/README.md). Without them
// the set is left out.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define ATTNSIEVE_ISA avx512
#include "kernels_body.h"
#else
#include "kernels.h"
namespace attnsieve::cpu::avx512 {
extern const Kernels* const kTable;
const Kernels* const kTable = nullptr;
}  // namespace attnsieve::cpu::avx512
#endif
