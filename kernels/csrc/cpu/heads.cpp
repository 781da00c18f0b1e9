// Owns: the small heads from end to end: checks, the three phases over threads, and the sums.
#include <utility>

#include "head_check.h"
#include "head_schedule.h"
#include "isa.h"

namespace sett {
namespace {

struct Phase {
  const HeadArgs& args;
  const cpu::HeadPlan& plan;
  cpu::HeadPhase run;
};

void run_range(void* context, int64_t begin, int64_t end) {
  const Phase& phase = *static_cast<const Phase*>(context);
  phase.run(phase.args, phase.plan, begin, end);
}

// In units of HeadPlan: about 15 microseconds, below which a second thread is not worth waking.
constexpr int64_t kGrain = 10000;

void sum_heads(const HeadArgs& args, Fault& fault) {
  SumArgs sums = {};
  Fault found = {};
  sums.wide = args.storage == Storage::f64;
  sums.count = args.segments + args.points;
  sums.tasks = args.task ? args.tasks : 0;
  sums.loss = args.loss;
  sums.weight = args.loss_weight;
  sums.task = args.task;
  sums.total = args.total;
  sums.by_task = args.by_task;
  sums.fault = &found;
  sum_losses_cpu(sums);
  if (found.kind != 0 && (fault.kind == 0 || found.where < fault.where)) fault = found;
}

}  // namespace

void head_losses_cpu(Isa isa, const HeadArgs& args, ParallelFor parallel) {
  const cpu::Kernels& kernels = cpu::kernels_for(isa, args.storage);
  Fault fault = {};
  const cpu::HeadSchedule schedule(args, cpu::checked_items(args, fault));
  const cpu::HeadPlan plan = schedule.plan();
  const auto over_threads = [&](cpu::HeadPhase run, int64_t time) {
    Phase phase = {args, plan, run};
    if (time > 0) parallel(time, kGrain, run_range, &phase);
  };
  over_threads(kernels.head_scores, schedule.tiles.total());
  over_threads(kernels.head_feature_gradients, schedule.feature_blocks.total());
  over_threads(kernels.head_row_gradients, schedule.row_blocks.total());
  sum_heads(args, fault);
  if (fault.kind != 0) *args.fault = fault;
}

}  // namespace sett
