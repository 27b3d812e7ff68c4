#include "kernels.h"

#include "code_products.h"

namespace attnsieve::cpu {

// Defined in kernels_<isa>.cpp; nullptr where that file was compiled without its flags. Data, not
// functions: nothing compiled for a wider set may run before the machine has been asked.
namespace baseline {
extern const Kernels* const kTable;
}
namespace avx2 {
extern const Kernels* const kTable;
}
namespace avx512 {
extern const Kernels* const kTable;
}
namespace vnni {
extern const CodeProducts* const kTable;
}

#if defined(__x86_64__) || defined(__i386__)
#define ATTNSIEVE_CPU_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define ATTNSIEVE_CPU_HAS(feature) false
#endif

const Kernels* baseline_kernels() { return baseline::kTable; }

const Kernels* avx2_kernels() {
  const bool runs =
      ATTNSIEVE_CPU_HAS("avx2") && ATTNSIEVE_CPU_HAS("fma") && ATTNSIEVE_CPU_HAS("f16c");
  return runs ? avx2::kTable : nullptr;
}

const Kernels* avx512_kernels() {
  const bool runs = ATTNSIEVE_CPU_HAS("avx512f") && ATTNSIEVE_CPU_HAS("avx512bw") &&
                    ATTNSIEVE_CPU_HAS("avx512vl") && ATTNSIEVE_CPU_HAS("avx512dq");
  return runs ? avx512::kTable : nullptr;
}

const CodeProducts* code_products() {
  const bool runs = ATTNSIEVE_CPU_HAS("avx512f") && ATTNSIEVE_CPU_HAS("avx512bw") &&
                    ATTNSIEVE_CPU_HAS("avx512vl") && ATTNSIEVE_CPU_HAS("avx512vnni");
  return runs ? vnni::kTable : nullptr;
}

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    if (const Kernels* wide = avx512_kernels()) return wide;
    if (const Kernels* wide = avx2_kernels()) return wide;
    return baseline_kernels();
  }();
  return *chosen;
}

}  // namespace attnsieve::cpu
