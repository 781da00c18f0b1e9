// Where the kernels meet torch: schemas, checks, allocation, threads and streams. Nothing is computed here.
//
// Owns: the ops of the namespace `sett`. Only the stable ABI of torch 2.11 is used, so that one build serves 2.11 and
// newer. Shapes, dtypes and devices are checked here, on the host; what only the device can see is checked by the
// kernels (sett.h, Fault): on the CPU the op that met it raises, on CUDA the next op does, or `check_faults`.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "sett.h"

#ifdef SETT_WITH_CUDA
// Both are met at link time alone: torch declares the first only where its own USE_CUDA is set, and the second would
// want the toolkit's headers.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
extern "C" int cudaHostAlloc(void** host, size_t size, unsigned int flags);
#endif

namespace {

using namespace sett::binding;

// ---------------------------------------------------------------------------------------------------------------------
// Tensors.

// Null only where there is no tensor: one without elements has no address, but it is there.
template <typename T> const T* pointer(const Optional& t) {
  static const double nothing = 0;
  if (!t.has_value()) return nullptr;
  const void* data = t->data_ptr();
  return static_cast<const T*>(data ? data : &nothing);
}
template <typename T> const T* pointer(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

ScalarType real_of(sett::Storage storage) {
  return storage == sett::Storage::f64 ? ScalarType::Double : ScalarType::Float;
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults.

void keep_lowest(sett::Fault& lowest, const sett::Fault& other) {
  if (other.kind != 0 && (lowest.kind == 0 || other.where < lowest.where)) lowest = other;
}

#ifdef SETT_WITH_CUDA
// One fault in host memory that all devices see. Kernels write it only when something is wrong.
sett::Fault* shared_fault() {
  static sett::Fault* fault = [] {
    void* memory = nullptr;
    const unsigned int portable_and_mapped = 1 | 2;
    const int error = cudaHostAlloc(&memory, sizeof(sett::Fault), portable_and_mapped);
    STD_TORCH_CHECK(error == 0, "cudaHostAlloc: ", sett::error_name_cuda(error));
    return new (memory) sett::Fault{};
  }();
  return fault;
}
#endif

// Raises what the last CUDA ops found. Only what has run by now is seen: synchronise first to see all.
void check_faults() {
#ifdef SETT_WITH_CUDA
  volatile sett::Fault* shared = shared_fault();
  if (shared->kind == 0) return;
  sett::Fault fault{};
  fault.kind = shared->kind;
  fault.where = shared->where;
  fault.value = shared->value;
  *shared_fault() = sett::Fault{};
  raise("a loss on CUDA", fault, -1);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Devices.

// SETT_KERNELS_ISA=generic|avx2|avx512 asks for less than the processor has: for tests and benchmarks.
sett::Isa isa() {
  static const sett::Isa chosen = [] {
    const sett::Isa best = sett::best_isa();
    const char* asked = std::getenv("SETT_KERNELS_ISA");
    if (asked == nullptr) return best;
    const std::string name(asked);
    sett::Isa wish = best;
    if (name == "generic") wish = sett::Isa::generic;
    else if (name == "avx2") wish = sett::Isa::avx2;
    else if (name == "avx512") wish = sett::Isa::avx512;
    else STD_TORCH_CHECK(false, "SETT_KERNELS_ISA: '", name, "' is none of generic, avx2, avx512");
    return std::min(wish, best);
  }();
  return chosen;
}

void parallel(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

#ifdef SETT_WITH_CUDA
void* stream_of(const Tensor& t) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream);
  return stream;
}

void succeeded(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": ", sett::error_name_cuda(error));
}
#else
void no_cuda(const Tensor& t) {
  STD_TORCH_CHECK(!t.is_cuda(), "the loss kernels were built without CUDA; see `sett doctor`");
}
#endif

// Segments are handed out by the scores in them, so that one vocabulary row weighs what thousands of small heads do.
void segment_losses_cpu_parallel(const sett::SegmentArgs& args) {
  const int64_t pieces = std::min<int64_t>(args.segments, 8 * static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t grain_scores = 4096;
  if (pieces <= 1 || args.elements + 8 * args.segments <= grain_scores) {
    sett::segment_losses_cpu(isa(), args, 0, args.segments);
    return;
  }
  // Cut where the offsets pass a share of the scores; unsorted offsets only cut badly, the kernels find the fault.
  std::vector<int64_t> cuts{0};
  for (int64_t i = 1; i < pieces; ++i) {
    const int64_t share = args.elements / pieces * i;
    const int64_t at = std::upper_bound(args.offsets, args.offsets + args.segments, share) - args.offsets;
    if (at > cuts.back() && at < args.segments) cuts.push_back(at);
  }
  cuts.push_back(args.segments);
  std::mutex mutex;
  torch::stable::parallel_for(0, static_cast<int64_t>(cuts.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    sett::Fault fault{};
    sett::SegmentArgs mine = args;
    mine.fault = &fault;
    sett::segment_losses_cpu(isa(), mine, cuts[begin], cuts[end]);
    if (fault.kind != 0) {
      const std::lock_guard<std::mutex> lock(mutex);
      keep_lowest(*args.fault, fault);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Ops.

struct Tasks {
  Optional task;
  int64_t count;
};

void run_segments(const char* op, const Tensor& x, sett::SegmentArgs& args, sett::SumArgs& sums) {
  if (x.is_cuda()) {
#ifdef SETT_WITH_CUDA
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    check_faults();
    args.fault = sums.fault = shared_fault();
    succeeded(sett::segment_losses_cuda(args, stream_of(x)), op);
    succeeded(sett::sum_losses_cuda(sums, stream_of(x)), op);
#else
    no_cuda(x);
#endif
    return;
  }
  sett::Fault fault{};
  args.fault = sums.fault = &fault;
  segment_losses_cpu_parallel(args);
  raise(op, fault, -1);
  sett::sum_losses_cpu(sums);
  raise(op, fault, -1);
}

using SegmentResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SegmentResult segments(const char* op, const Tensor& x, const Optional& y, const Tensor& offsets,
                       const Optional& target, const Optional& weight, const Optional& kl_weight,
                       const Optional& smoothing, double z_loss, const Tasks& tasks, int64_t longest, bool gradient,
                       bool in_place) {
  const sett::Storage storage = storage_of(x, "x");
  const ScalarType real = real_of(storage);
  STD_TORCH_CHECK(x.dim() == 1, "x: must have one dimension, has shape ", shape_of(x));
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets: must be [G + 1], is ", shape_of(offsets));
  const int64_t elements = x.size(0), count = offsets.size(0) - 1;
  check(x, "x", x.scalar_type(), x, {elements});
  check(offsets, "offsets", ScalarType::Long, x, {count + 1});
  if (y) check(*y, "y", x.scalar_type(), x, {elements});
  STD_TORCH_CHECK(target.has_value() == weight.has_value(), "target and weight: give both or none");
  STD_TORCH_CHECK(y.has_value() == kl_weight.has_value(), "y and kl_weight: give both or none");
  STD_TORCH_CHECK(target.has_value() || y.has_value(), "give a target (cross-entropy), y (symmetric KL), or both");
  if (target) check(*target, "target", ScalarType::Long, x, {count});
  if (weight) check(*weight, "weight", ScalarType::Float, x, {count});
  if (kl_weight) check(*kl_weight, "kl_weight", ScalarType::Float, x, {count});
  if (smoothing) check(*smoothing, "smoothing", ScalarType::Float, x, {count});
  STD_TORCH_CHECK(!tasks.task || tasks.count > 0, "tasks: must be positive where task is given");
  if (tasks.task) check(*tasks.task, "task", ScalarType::Long, x, {count});

  Tensor total = empty(x, {}, real), loss = empty(x, {target ? count : 0}, real), kl = empty(x, {y ? count : 0}, real);
  Tensor by_task = empty(x, {tasks.task ? tasks.count : 0}, real);
  Tensor grad_x = in_place ? x : empty(x, {gradient ? elements : 0}, x.scalar_type());
  Tensor grad_y = empty(x, {gradient && y ? elements : 0}, x.scalar_type());

  sett::SegmentArgs args{};
  args.storage = storage;
  args.elements = elements;
  args.segments = count;
  args.longest = longest < 0 ? elements : std::min(longest, elements);
  args.x = x.data_ptr();
  args.y = pointer<void>(y);
  args.offsets = pointer<int64_t>(offsets);
  args.target = pointer<int64_t>(target);
  args.weight = pointer<float>(weight);
  args.kl_weight = pointer<float>(kl_weight);
  args.smoothing = pointer<float>(smoothing);
  args.z_loss = z_loss;
  args.loss = target ? loss.data_ptr() : nullptr;
  args.kl = y ? kl.data_ptr() : nullptr;
  args.grad_x = gradient ? grad_x.data_ptr() : nullptr;
  args.grad_y = gradient && y ? grad_y.data_ptr() : nullptr;

  // The sums take the cross-entropy first and J beside it; with J alone, J is the first.
  sett::SumArgs sums{};
  sums.wide = real == ScalarType::Double;
  sums.count = count;
  sums.tasks = tasks.task ? tasks.count : 0;
  sums.loss = target ? args.loss : args.kl;
  sums.weight = target ? args.weight : args.kl_weight;
  sums.more = target ? args.kl : nullptr;
  sums.more_weight = target ? args.kl_weight : nullptr;
  sums.task = pointer<int64_t>(tasks.task);
  sums.total = total.data_ptr();
  sums.by_task = by_task.data_ptr();
  run_segments(op, x, args, sums);
  return {total, loss, kl, by_task, in_place ? empty(x, {0}, x.scalar_type()) : grad_x, grad_y};
}

SegmentResult segment_losses(Tensor x, Optional y, Tensor offsets, Optional target, Optional weight,
                             Optional kl_weight, Optional smoothing, double z_loss, Optional task, int64_t tasks,
                             int64_t longest, bool gradient) {
  return segments("segment_losses", x, y, offsets, target, weight, kl_weight, smoothing, z_loss, {task, tasks},
                  longest, gradient, false);
}

std::tuple<Tensor, Tensor> segment_cross_entropy_(Tensor x, Tensor offsets, Tensor target, Tensor weight,
                                                  Optional smoothing, double z_loss, int64_t longest) {
  auto result = segments("segment_cross_entropy_", x, std::nullopt, offsets, target, weight, std::nullopt, smoothing,
                         z_loss, {std::nullopt, 0}, longest, true, true);
  return {std::get<0>(result), std::get<1>(result)};
}

void run_heads(const Tensor& features, sett::HeadArgs& args) {
  const char* op = "head_losses";
  if (features.is_cuda()) {
#ifdef SETT_WITH_CUDA
    const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
    check_faults();
    args.fault = shared_fault();
    succeeded(sett::head_losses_cuda(args, stream_of(features)), op);
#else
    no_cuda(features);
#endif
    return;
  }
  sett::Fault fault{};
  args.fault = &fault;
  sett::head_losses_cpu(isa(), args, parallel);
  raise(op, fault, args.segments);
}

using HeadResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

HeadResult head_losses(Tensor features, Tensor weight, Optional bias, Tensor segment, Tensor offsets, Tensor target,
                       Tensor loss_weight, Optional smoothing, Tensor point, Tensor value, double z_loss,
                       Optional task, int64_t tasks, int64_t scores_count, bool gradient) {
  const sett::Storage storage = storage_of(features, "features");
  const ScalarType real = real_of(storage), type = features.scalar_type();
  STD_TORCH_CHECK(features.dim() == 2, "features: must be [F, H], is ", shape_of(features));
  STD_TORCH_CHECK(weight.dim() == 2, "weight: must be [R, H], is ", shape_of(weight));
  STD_TORCH_CHECK(segment.dim() == 2, "segment: must be [G, 4], is ", shape_of(segment));
  STD_TORCH_CHECK(point.dim() == 2, "point: must be [N, 2], is ", shape_of(point));
  const int64_t F = features.size(0), H = features.size(1), R = weight.size(0);
  const int64_t G = segment.size(0), N = point.size(0);
  check(features, "features", type, features, {F, H});
  check(weight, "weight", type, features, {R, H});
  if (bias) check(*bias, "bias", type, features, {R});
  check(segment, "segment", ScalarType::Long, features, {G, 4});
  check(offsets, "offsets", ScalarType::Long, features, {G + 1});
  check(target, "target", ScalarType::Long, features, {G});
  check(loss_weight, "loss_weight", ScalarType::Float, features, {G + N});
  if (smoothing) check(*smoothing, "smoothing", ScalarType::Float, features, {G});
  check(point, "point", ScalarType::Long, features, {N, 2});
  check(value, "value", ScalarType::Float, features, {N});
  STD_TORCH_CHECK(!task || tasks > 0, "tasks: must be positive where task is given");
  if (task) check(*task, "task", ScalarType::Long, features, {G + N});
  STD_TORCH_CHECK(scores_count >= 0, "scores_count: must not be negative");

  const int64_t scored = scores_count + N;
  Tensor total = empty(features, {}, real), loss = empty(features, {G + N}, real);
  Tensor scores = empty(features, {scored}, real), grad_scores = empty(features, {scored + 1}, real);
  Tensor by_task = empty(features, {task ? tasks : 0}, real);
  Tensor grad_features = empty(features, {gradient ? F : 0, H}, type);
  Tensor grad_weight = empty(features, {gradient ? R : 0, H}, type);
  Tensor grad_bias = empty(features, {gradient && bias ? R : 0}, type);

  sett::HeadArgs args{};
  args.storage = storage;
  args.feature_count = F;
  args.hidden = H;
  args.row_count = R;
  args.segments = G;
  args.scores_count = scores_count;
  args.points = N;
  args.features = features.data_ptr();
  args.weight = weight.data_ptr();
  args.bias = pointer<void>(bias);
  args.segment = pointer<int64_t>(segment);
  args.offsets = pointer<int64_t>(offsets);
  args.target = pointer<int64_t>(target);
  args.loss_weight = pointer<float>(loss_weight);
  args.smoothing = pointer<float>(smoothing);
  args.point = pointer<int64_t>(point);
  args.value = pointer<float>(value);
  args.z_loss = z_loss;
  args.task = pointer<int64_t>(task);
  args.tasks = task ? tasks : 0;
  args.scores = scores.data_ptr();
  args.grad_scores = gradient ? grad_scores.data_ptr() : nullptr;
  args.loss = loss.data_ptr();
  args.total = total.data_ptr();
  args.by_task = by_task.data_ptr();
  args.grad_features = gradient ? grad_features.data_ptr() : nullptr;
  args.grad_weight = gradient ? grad_weight.data_ptr() : nullptr;
  args.grad_bias = gradient && bias ? grad_bias.data_ptr() : nullptr;
  run_heads(features, args);
  return {total, loss, scores, by_task, grad_features, grad_weight, grad_bias};
}

// x *= scale without a look at scale on the host; free where it is 1, which it is unless a loss scaler is at work.
void scale_(Tensor x, Tensor scale) {
  const sett::Storage storage = storage_of(x, "x");
  check(scale, "scale", real_of(storage), x, {});
  STD_TORCH_CHECK(x.is_contiguous(), "x: must be contiguous");
#ifdef SETT_WITH_CUDA
  STD_TORCH_CHECK(x.is_cuda(), "x: must be on a GPU");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  succeeded(sett::scale_cuda(storage, x.data_ptr(), x.numel(), scale.data_ptr(), stream_of(x)), "scale_");
#else
  no_cuda(x);
#endif
}

// What the CPU kernels run as, for `sett doctor` and the benchmark's report.
std::string describe_isa() {
  switch (isa()) {
    case sett::Isa::avx512: return "avx512";
    case sett::Isa::avx2: return "avx2";
    case sett::Isa::generic: break;
  }
  return "generic";
}

}  // namespace

STABLE_TORCH_LIBRARY(sett, m) {
  m.def(
      "segment_losses(Tensor x, Tensor? y, Tensor offsets, Tensor? target, Tensor? weight, Tensor? kl_weight, "
      "Tensor? smoothing, float z_loss, Tensor? task, int tasks, int longest, bool gradient) -> "
      "(Tensor total, Tensor loss, Tensor kl, Tensor by_task, Tensor grad_x, Tensor grad_y)");
  m.def(
      "segment_cross_entropy_(Tensor(a!) x, Tensor offsets, Tensor target, Tensor weight, Tensor? smoothing, "
      "float z_loss, int longest) -> (Tensor total, Tensor loss)");
  m.def(
      "head_losses(Tensor features, Tensor weight, Tensor? bias, Tensor segment, Tensor offsets, Tensor target, "
      "Tensor loss_weight, Tensor? smoothing, Tensor point, Tensor value, float z_loss, Tensor? task, int tasks, "
      "SymInt scores_count, bool gradient) -> (Tensor total, Tensor loss, Tensor scores, Tensor by_task, "
      "Tensor grad_features, Tensor grad_weight, Tensor grad_bias)");
  m.def("scale_(Tensor(a!) x, Tensor scale) -> ()");
  m.def("check_faults() -> ()");
  m.def("isa() -> str");
}

#define SETT_IMPLEMENT(device)                                           \
  STABLE_TORCH_LIBRARY_IMPL(sett, device, m) {                           \
    m.impl("segment_losses", TORCH_BOX(&segment_losses));                \
    m.impl("segment_cross_entropy_", TORCH_BOX(&segment_cross_entropy_)); \
    m.impl("head_losses", TORCH_BOX(&head_losses));                      \
    m.impl("scale_", TORCH_BOX(&scale_));                                \
  }
SETT_IMPLEMENT(CPU)
SETT_IMPLEMENT(CUDA)

STABLE_TORCH_LIBRARY_IMPL(sett, CompositeExplicitAutograd, m) {
  m.impl("check_faults", TORCH_BOX(&check_faults));
  m.impl("isa", TORCH_BOX(&describe_isa));
}
