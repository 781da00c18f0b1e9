// Owns: the loop over a range of segments, and the checks of what the caller said about each.
#pragma once

#include "softmax_impl.h"

namespace sett {
namespace SETT_CPU_ISA {

template <typename M, typename S> class SegmentLoop {
 public:
  using R = typename M::Scalar;

  explicit SegmentLoop(const SegmentArgs& args) : args_(args) {}

  void run(int64_t begin, int64_t end) {
    if (args_.segments == 0 && begin == 0 && args_.offsets[0] != args_.elements) {
      record(FaultKind::offsets, 0, args_.offsets[0]);
    }
    for (int64_t g = begin; g < end; ++g) one(g);
  }

 private:
  void one(int64_t g) {
    // The first segment begins at 0 and the last ends at E, whatever the offsets say.
    const bool is_first = g == 0, is_last = g + 1 == args_.segments;
    const int64_t from = args_.offsets[g], to = args_.offsets[g + 1];
    const bool ascending = 0 <= from && from <= to && to <= args_.elements;
    if (!ascending || (is_first && from != 0) || (is_last && to != args_.elements)) {
      record(FaultKind::offsets, g, to);
      return fail(g, is_first ? 0 : from, is_last ? args_.elements : to);
    }
    const int64_t length = to - from;
    int64_t target = args_.target ? args_.target[g] : kIgnore;
    if (target == kIgnore) {
      target = -1;
    } else if (length == 0) {
      record(FaultKind::empty, g, 0);
      return fail(g, from, to);
    } else if (target < 0 || target >= length) {
      record(FaultKind::target, g, target);
      return fail(g, from, to);
    }
    Losses<R> losses = {R(0), R(0)};
    if (length > 0) {
      Segment<S> segment = {};
      segment.x = static_cast<const S*>(args_.x) + from;
      segment.length = length;
      segment.target = target;
      segment.z_loss = static_cast<R>(args_.z_loss);
      if (target >= 0) segment.weight = static_cast<R>(args_.weight[g]);
      if (target >= 0 && args_.smoothing) segment.smoothing = static_cast<R>(args_.smoothing[g]);
      if (args_.grad_x) segment.grad_x = static_cast<S*>(args_.grad_x) + from;
      if (args_.y) {
        segment.y = static_cast<const S*>(args_.y) + from;
        segment.kl_weight = static_cast<R>(args_.kl_weight[g]);
        if (args_.grad_x) segment.grad_y = static_cast<S*>(args_.grad_y) + from;
      }
      losses = segment_losses<M>(segment);
    }
    if (args_.loss) static_cast<R*>(args_.loss)[g] = losses.cross_entropy;
    if (args_.kl) static_cast<R*>(args_.kl)[g] = losses.divergence;
  }

  // NaN losses; gradients of zero where the range is one.
  void fail(int64_t g, int64_t from, int64_t to) {
    const R nan = static_cast<R>(NAN);
    if (args_.loss) static_cast<R*>(args_.loss)[g] = nan;
    if (args_.kl) static_cast<R*>(args_.kl)[g] = nan;
    if (from < 0 || from > to || to > args_.elements) return;
    if (args_.grad_x) clear<M>(static_cast<S*>(args_.grad_x) + from, to - from);
    if (args_.grad_x && args_.y) clear<M>(static_cast<S*>(args_.grad_y) + from, to - from);
  }

  void record(FaultKind kind, int64_t where, int64_t value) {
    if (!faulty_) *args_.fault = {static_cast<int32_t>(kind), 0, where, value};
    faulty_ = true;
  }

  const SegmentArgs& args_;
  bool faulty_ = false;
};

}  // namespace SETT_CPU_ISA
}  // namespace sett
