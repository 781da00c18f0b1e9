// Owns: the checks of the segments and points of the small heads. See head_check.h.
#include "head_check.h"

#include <algorithm>
#include <cmath>

namespace sett {
namespace cpu {
namespace {

class Checker {
 public:
  Checker(const HeadArgs& args, Fault& fault) : args_(args), fault_(fault) {}

  std::vector<HeadItem> run() {
    std::vector<HeadItem> items(static_cast<size_t>(args_.segments + args_.points), HeadItem{});
    if (args_.segments == 0 && args_.offsets[0] != args_.scores_count) {
      record(FaultKind::offsets, 0, args_.offsets[0]);
    }
    for (int64_t g = 0; g < args_.segments; ++g) check_segment(g, items[static_cast<size_t>(g)]);
    for (int64_t i = 0; i < args_.points; ++i) check_point(i, items[static_cast<size_t>(args_.segments + i)]);
    return items;
  }

 private:
  void check_segment(int64_t g, HeadItem& item) {
    const int64_t from = args_.offsets[g], to = args_.offsets[g + 1];
    const int64_t* fields = args_.segment + 4 * g;
    const int64_t features = fields[1], rows = fields[3], length = to - from, target = args_.target[g];
    const bool is_first = g == 0, is_last = g + 1 == args_.segments, ignored = target == kIgnore;
    // Segments that overlap an earlier one, though their own offsets ascend, would have two threads write one score.
    const bool sound = 0 <= from && from >= reached_ && from <= to && to <= args_.scores_count;
    if (!sound || (is_first && from != 0) || (is_last && to != args_.scores_count)) {
      record(FaultKind::offsets, g, to);
      return fail(g, std::max(is_first ? 0 : from, reached_), is_last ? args_.scores_count : to);
    }
    reached_ = to;
    if (length == 0 && ignored && (features == 0 || rows == 0)) return set_loss(g, 0.0);
    if (length == 0 && (features == 0 || rows == 0)) {
      record(FaultKind::empty, g, 0);
      return fail(g, from, to);
    }
    if (!((features == 1 && rows == length) || (rows == 1 && features == length)) || length < 1) {
      record(FaultKind::shape, g, length);
      return fail(g, from, to);
    }
    if (!in_range(FaultKind::feature, g, fields[0], features, args_.feature_count) ||
        !in_range(FaultKind::row, g, fields[2], rows, args_.row_count)) {
      return fail(g, from, to);
    }
    if (!ignored && (target < 0 || target >= length)) {
      record(FaultKind::target, g, target);
      return fail(g, from, to);
    }
    item = {fields[0], features, fields[2], rows, from, !ignored && args_.loss_weight[g] != 0.0f, false};
  }

  void check_point(int64_t i, HeadItem& item) {
    const int64_t feature = args_.point[2 * i], row = args_.point[2 * i + 1], where = args_.segments + i;
    const int64_t score = args_.scores_count + i;
    if (!in_range(FaultKind::feature, where, feature, 1, args_.feature_count) ||
        !in_range(FaultKind::row, where, row, 1, args_.row_count)) {
      return fail(where, score, score + 1);
    }
    item = {feature, 1, row, 1, score, args_.loss_weight[where] != 0.0f, false};
  }

  bool in_range(FaultKind kind, int64_t where, int64_t first, int64_t count, int64_t limit) {
    if (first >= 0 && first < limit && count <= limit - first) return true;
    record(kind, where, first >= 0 && first < limit ? limit : first);
    return false;
  }

  void record(FaultKind kind, int64_t where, int64_t value) {
    if (fault_.kind == 0) fault_ = {static_cast<int32_t>(kind), 0, where, value};
  }

  void fail(int64_t i, int64_t from, int64_t to) {
    set_loss(i, NAN);
    const int64_t limit = args_.scores_count + args_.points;
    if (from < 0 || from >= to || to > limit) return;
    args_.storage == Storage::f64 ? blank<double>(from, to) : blank<float>(from, to);
  }

  template <typename Real> void blank(int64_t from, int64_t to) {
    std::fill(static_cast<Real*>(args_.scores) + from, static_cast<Real*>(args_.scores) + to, static_cast<Real>(NAN));
    Real* gradient = static_cast<Real*>(args_.grad_scores);
    if (gradient) std::fill(gradient + from, gradient + to, Real(0));
  }

  void set_loss(int64_t i, double value) {
    if (args_.storage == Storage::f64) static_cast<double*>(args_.loss)[i] = value;
    else static_cast<float*>(args_.loss)[i] = static_cast<float>(value);
  }

  const HeadArgs& args_;
  Fault& fault_;
  int64_t reached_ = 0;  // the end of the last sound segment
};

}  // namespace

std::vector<HeadItem> checked_items(const HeadArgs& args, Fault& fault) { return Checker(args, fault).run(); }

}  // namespace cpu
}  // namespace sett
