// Owns: the choice of a kernel's instance by storage type, and so the list of all instances.
//
// Each file that includes this defines MachineOf<S>: the vectors that scores of storage S are computed with.
#pragma once

#include "heads_impl.h"
#include "segments_impl.h"

namespace sett {
namespace SETT_CPU_ISA {

template <typename S> struct SegmentsEntry {
  static void run(const SegmentArgs& args, int64_t begin, int64_t end) {
    SegmentLoop<MachineOf<S>, S>(args).run(begin, end);
  }
};

template <typename S> struct ScoresEntry {
  static void run(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end) {
    head_scores<MachineOf<S>, S>(args, plan, begin, end);
  }
};

template <typename S> struct FeaturesEntry {
  static void run(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end) {
    head_feature_gradients<MachineOf<S>, S>(args, plan, begin, end);
  }
};

template <typename S> struct RowsEntry {
  static void run(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end) {
    head_row_gradients<MachineOf<S>, S>(args, plan, begin, end);
  }
};

// fp64 is generic.cpp's alone; see kernels_for.
template <template <typename> class Entry, typename Args, typename... More>
void by_storage(const Args& args, More... more) {
  switch (args.storage) {
    case Storage::f32: return Entry<float>::run(args, more...);
    case Storage::f16: return Entry<Half>::run(args, more...);
    case Storage::bf16: return Entry<Brain>::run(args, more...);
    case Storage::f64:
#if defined(SETT_CPU_WIDE)
      return Entry<double>::run(args, more...);
#else
      return;
#endif
  }
}

inline void any_segments(const SegmentArgs& args, int64_t begin, int64_t end) {
  by_storage<SegmentsEntry>(args, begin, end);
}
inline void any_scores(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end) {
  by_storage<ScoresEntry, HeadArgs, const HeadPlan&>(args, plan, begin, end);
}
inline void any_features(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end) {
  by_storage<FeaturesEntry, HeadArgs, const HeadPlan&>(args, plan, begin, end);
}
inline void any_rows(const HeadArgs& args, const HeadPlan& plan, int64_t begin, int64_t end) {
  by_storage<RowsEntry, HeadArgs, const HeadPlan&>(args, plan, begin, end);
}

constexpr cpu::Kernels kKernels = {any_segments, any_scores, any_features, any_rows};

}  // namespace SETT_CPU_ISA
}  // namespace sett
