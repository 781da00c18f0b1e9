// Owns: which instruction set the CPU kernels use.
#include "isa.h"

namespace sett {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  // F16C, which __builtin_cpu_supports of older compilers does not know, is in every processor that has AVX2.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

namespace cpu {

const Kernels& kernels_for(Isa isa, Storage storage) {
#if defined(__x86_64__)
  static const Isa best = best_isa();
  const Isa usable = isa < best ? isa : best;
  if (storage != Storage::f64) {
    if (usable == Isa::avx512) return kAvx512Kernels;
    if (usable == Isa::avx2) return kAvx2Kernels;
  }
#else
  (void)isa, (void)storage;
#endif
  return kGenericKernels;
}

}  // namespace cpu

void segment_losses_cpu(Isa isa, const SegmentArgs& args, int64_t begin, int64_t end) {
  cpu::kernels_for(isa, args.storage).segment_losses(args, begin, end);
}

}  // namespace sett
