// Owns: the CPU kernels in plain C++, for any processor, and the only ones for fp64.
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SETT_CPU_ISA cpu_generic
#define SETT_CPU_WIDE
#include "../row_algebra.h"
#include "isa.h"
#include "vector_scalar.h"

namespace sett {
namespace SETT_CPU_ISA {
template <typename S> using MachineOf = ScalarMachine<Real<S>>;
}
}  // namespace sett

#include "kernels_impl.h"

namespace sett {
namespace cpu {
const Kernels kGenericKernels = SETT_CPU_ISA::kKernels;
}
}  // namespace sett
