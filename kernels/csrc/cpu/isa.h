// One set of CPU kernels per instruction set, chosen while the program runs.
//
// Owns: the table of entry points that generic.cpp, avx2.cpp and avx512.cpp each fill, and the rule that keeps the
// three apart. Those files compile the same headers for different processors, so a function of theirs must never be a
// shared (weak) symbol: the linker would keep one copy, perhaps the AVX-512 one, for all. Hence
//   - everything of ours that they include lives in namespace sett::SETT_CPU_ISA, a macro each of them sets;
//   - the vector files rename row_algebra.h's namespace `algebra` likewise, by a macro of that name;
//   - they use no template or inline function of the standard library; what needs containers is in head_plan.cpp.
#pragma once

#include "../sett.h"
#include "head_plan.h"

namespace sett {
namespace cpu {

// The three phases of the small heads, each over a range of its cost axis (see head_plan.h).
using HeadPhase = void (*)(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end);

struct Kernels {
  void (*segment_losses)(const SegmentArgs& args, int64_t begin, int64_t end);
  HeadPhase head_scores;             // scores, losses, grad_scores, and grad_features of features with one use
  HeadPhase head_feature_gradients;  // grad_features of all others
  HeadPhase head_row_gradients;      // grad_weight and grad_bias
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The kernels of `isa`, or of the best instruction set below it that can run here; fp64 always gets the generic ones.
const Kernels& kernels_for(Isa isa, Storage storage);

}  // namespace cpu
}  // namespace sett
