// Flags: -mavx2 -mfma -mf16c (see cpu/README.md). Without them the set is left out.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ATTNSIEVE_ISA avx2
#include "kernels_body.h"
#else
#include "kernels.h"
namespace attnsieve::cpu::avx2 {
extern const Kernels* const kTable;
const Kernels* const kTable = nullptr;
}  // namespace attnsieve::cpu::avx2
#endif
