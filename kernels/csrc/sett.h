// The C interface of the loss kernels: what the binding, which knows torch, asks of the kernels, which do not.
//
// Owns: the argument blocks. All pointers of a block are on one device; all tensors are contiguous. What is named
// "nullable" may be a null pointer. Kernels never trust an index they were given: a bad segment gets a NaN loss and
// zero gradients, nothing out of bounds is read or written, and `fault` says what was found.
//
// Terms. A segment is a run of scores that one softmax covers. E scores in G segments: segment g is
// scores[offsets[g]] to scores[offsets[g + 1] - 1]. Storage may be fp32, fp16, bf16 or fp64; arithmetic is fp32, and
// fp64 for fp64. `Real` below is what arithmetic is in: loss buffers are fp64 for fp64 storage and fp32 otherwise.
#pragma once

#include <stdint.h>

namespace sett {

enum class Storage : int32_t { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

// A target that means "no loss here": loss 0, gradient 0.
constexpr int64_t kIgnore = -100;

enum class FaultKind : int32_t {
  none = 0,
  offsets,        // offsets do not ascend from 0 to E: segment `where`, value = the offset that ends it
  target,         // segment `where`: target `value` is outside of it
  empty,          // segment `where` has no score and is not ignored
  feature,        // segment `where`: feature `value` does not exist
  row,            // segment `where`: row `value` of the packed head does not exist
  shape,          // segment `where` is not one feature by rows, or features by one row; value = its length by offsets
  task,           // segment `where`: task `value` does not exist
};

// The fault of the lowest segment that has one; `where` counts regression points after all segments. All zeros before
// the call.
struct Fault {
  int32_t kind;      // FaultKind
  int32_t reserved;  // a lock, while threads of a GPU settle whose fault is the lowest
  int64_t where;
  int64_t value;
};

// Softmax losses of flat scores. With `x` alone: cross-entropy. With `y` too: J = KL(p || q) + KL(q || p) of the
// softmax p of x and q of y, segment by segment, and with targets the cross-entropy of x beside it.
struct SegmentArgs {
  Storage storage;          // of x, y, grad_x, grad_y
  int64_t elements;         // E
  int64_t segments;         // G
  int64_t longest;          // an upper bound of the segments' lengths, known on the host; sizes the launch
  const void* x;            // [E]
  const void* y;            // [E], nullable: no KL
  const int64_t* offsets;   // [G + 1]
  const int64_t* target;    // [G], nullable: no cross-entropy; kIgnore leaves a segment's cross-entropy out
  const float* weight;      // [G] of the cross-entropy in the total; nullable without targets
  const float* kl_weight;   // [G] of J in the total; nullable without y
  const float* smoothing;   // [G] label smoothing in [0, 1], nullable: none
  double z_loss;            // adds z_loss * logsumexp^2 to each cross-entropy
  void* loss;               // [G] Real, cross-entropy without its weight; nullable without targets
  void* kl;                 // [G] Real, J without its weight; nullable without y
  void* grad_x;             // [E] storage, d total / d x; nullable: no gradients. May be x itself.
  void* grad_y;             // [E] storage, d total / d y; nullable exactly when grad_x or y is. May be y itself.
  Fault* fault;             // written only where there is a fault
};

// total = sum over i of weight[i] * loss[i] (+ more_weight[i] * more[i]), and by_task[t] = the part of it with
// task[i] == t; both in ascending order of i, in fp64 on the CPU, in a fixed tree on CUDA: the same bits whenever the
// input is the same. A term of weight 0 adds nothing, whatever its loss.
struct SumArgs {
  int32_t wide;             // loss, total and by_task are fp64; otherwise fp32
  int64_t count;            // how many losses
  int64_t tasks;            // how many tasks; 0 leaves by_task out
  const void* loss;         // [count]
  const float* weight;      // [count]
  const int64_t* task;      // [count] in [0, tasks), nullable when tasks is 0
  const void* more;         // [count] a second loss with weight more_weight in the total (J), nullable
  const float* more_weight; // [count]
  void* total;              // [1]
  void* by_task;            // [tasks]
  Fault* fault;
};

// All small heads at once. A segment g = (feature_first, feature_count, row_first, row_count) is either one feature
// against consecutive rows of the packed weight (classification) or consecutive features against one row (multiple
// choice, spans); its scores, in that order, are scores[offsets[g]] and on. A point is one feature against one row,
// compared with a value by squared error (regression). The losses of points follow those of segments.
struct HeadArgs {
  Storage storage;          // of features, weight, bias and their gradients
  int64_t feature_count;    // F
  int64_t hidden;           // H
  int64_t row_count;        // R
  int64_t segments;         // G
  int64_t scores_count;     // E
  int64_t points;           // N
  const void* features;     // [F, H]
  const void* weight;       // [R, H]
  const void* bias;         // [R], nullable
  const int64_t* segment;   // [G, 4]
  const int64_t* offsets;   // [G + 1], ascending from 0 to E
  const int64_t* target;    // [G]; kIgnore leaves a segment out
  const float* loss_weight; // [G + N]: of segments, then of points
  const float* smoothing;   // [G], nullable
  const int64_t* point;     // [N, 2] (feature, row)
  const float* value;       // [N]
  double z_loss;
  const int64_t* task;      // [G + N] in [0, tasks), nullable when tasks is 0
  int64_t tasks;
  void* scores;             // [E + N] Real: scores of segments, then predictions of points
  void* grad_scores;        // [E + N] Real, d total / d scores; nullable: no gradients
  void* loss;               // [G + N] Real
  void* total;              // [1] Real
  void* by_task;            // [tasks] Real
  void* grad_features;      // [F, H]; this and the next two are nullable exactly when grad_scores is
  void* grad_weight;        // [R, H]; rows no segment uses get zeros
  void* grad_bias;          // [R], nullable when bias is
  Fault* fault;
};

// CPU. `begin` and `end` are a range of segments: the caller splits the work over threads; ranges write disjoint
// memory, except `fault`, of which every call gets its own. `isa` is the best one by default (best_isa()).
enum class Isa : int32_t { generic = 0, avx2 = 1, avx512 = 2 };

Isa best_isa();  // what this processor and operating system can run
void segment_losses_cpu(Isa isa, const SegmentArgs& args, int64_t begin, int64_t end);
void sum_losses_cpu(const SumArgs& args);

// Runs body(context, begin, end) over disjoint ranges that cover [0, count), possibly on several threads at once.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end),
                             void* context);
void head_losses_cpu(Isa isa, const HeadArgs& args, ParallelFor parallel);

// CUDA. `stream` is a cudaStream_t. The return value is a cudaError_t: 0 is success. Nothing waits for the device.
int segment_losses_cuda(const SegmentArgs& args, void* stream);
int sum_losses_cuda(const SumArgs& args, void* stream);
int head_losses_cuda(const HeadArgs& args, void* stream);  // two launches, sums included
const char* error_name_cuda(int error);

// x *= *scale in place, doing nothing when *scale == 1 (Real; read on the device, by the kernel).
int scale_cuda(Storage storage, void* x, int64_t elements, const void* scale, void* stream);

}  // namespace sett
