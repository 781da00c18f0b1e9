// Owns: the sums of losses, in fp64 and in ascending order whatever the storage.
#include <cstddef>
#include <vector>

#include "../sett.h"

namespace sett {
namespace {

// A term of weight 0 adds nothing, even where the loss is infinite.
template <typename Real> double term(float weight, Real loss) {
  return weight == 0.0f ? 0.0 : static_cast<double>(weight) * static_cast<double>(loss);
}

template <typename Real> void sum_losses(const SumArgs& args) {
  const Real* loss = static_cast<const Real*>(args.loss);
  const Real* more = static_cast<const Real*>(args.more);
  std::vector<double> by_task(static_cast<size_t>(args.tasks), 0.0);
  double total = 0;
  bool faulty = false;
  for (int64_t i = 0; i < args.count; ++i) {
    const double part = term(args.weight[i], loss[i]) + (more ? term(args.more_weight[i], more[i]) : 0.0);
    total += part;
    if (args.tasks == 0) continue;
    const int64_t task = args.task[i];
    if (task >= 0 && task < args.tasks) {
      by_task[static_cast<size_t>(task)] += part;
    } else if (!faulty) {
      faulty = true;
      *args.fault = {static_cast<int32_t>(FaultKind::task), 0, i, task};
    }
  }
  *static_cast<Real*>(args.total) = static_cast<Real>(total);
  for (int64_t t = 0; t < args.tasks; ++t) {
    static_cast<Real*>(args.by_task)[t] = static_cast<Real>(by_task[static_cast<size_t>(t)]);
  }
}

}  // namespace

void sum_losses_cpu(const SumArgs& args) { args.wide ? sum_losses<double>(args) : sum_losses<float>(args); }

}  // namespace sett
