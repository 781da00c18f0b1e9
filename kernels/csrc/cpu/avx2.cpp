// Owns: the CPU kernels for AVX2 with FMA and F16C. Nothing on other processors.
#if defined(__x86_64__)

// What others own is included before the instruction set is switched on, so that none of it is compiled for it.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "isa.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#define SETT_CPU_ISA cpu_avx2
// A namespace of its own for row_algebra.h: its scalar functions are compiled for this instruction set too, see isa.h.
#define algebra algebra_avx2
#include "../row_algebra.h"
#include "vector_avx2.h"

namespace sett {
namespace SETT_CPU_ISA {
template <typename S> using MachineOf = VectorMachine;
}
}  // namespace sett

#include "kernels_impl.h"

namespace sett {
namespace cpu {
const Kernels kAvx2Kernels = SETT_CPU_ISA::kKernels;
}
}  // namespace sett

#pragma GCC pop_options

#endif
