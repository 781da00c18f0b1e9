// Reporting bad input from a kernel.
//
// Owns: how the fault of the lowest segment comes to stand in `Fault`, all fields from the same segment. Reporters take
// turns behind a lock in the `reserved` field, which is 0 before and after; good input never touches any of it. `Fault`
// starts as all zeros.
#pragma once

#include "../sett.h"
#include "device.h"

namespace sett {
namespace cuda {

struct Finding {
  FaultKind kind;
  int64_t value;
};

static __device__ __noinline__ void report(Fault* fault, int64_t where, Finding finding) {
  if (fault == nullptr) return;
  // What the holder does is in the loop: lanes of its own warp that still try must not keep it from going on.
  for (bool done = false; !done;) {
    if (atomicCAS(&fault->reserved, 0, 1) != 0) continue;
    __threadfence();
    // Volatile: what the last holder wrote, not what this SM has cached.
    volatile Fault* shared = fault;
    if (shared->kind == static_cast<int32_t>(FaultKind::none) || where < shared->where) {
      shared->kind = static_cast<int32_t>(finding.kind);
      shared->where = where;
      shared->value = finding.value;
    }
    __threadfence();
    atomicExch(&fault->reserved, 0);
    done = true;
  }
}

}  // namespace cuda
}  // namespace sett
