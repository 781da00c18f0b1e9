// Thread-block clusters on a CPU; see cuda_runtime.h. An arrive does nothing here, a wait is the whole barrier.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const { return shim::here.rank; }
  unsigned num_blocks() const { return static_cast<unsigned>(shim::here.cluster->blocks.size()); }
  static void barrier_arrive() {}
  static void barrier_wait() { shim::here.cluster->barrier.wait(); }
  template <typename T> T* map_shared_rank(T* place, unsigned rank) const {
    const ptrdiff_t offset = reinterpret_cast<unsigned char*>(place) - shared_memory();
    return reinterpret_cast<T*>(shim::here.cluster->blocks[rank]->memory.get() + offset);
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
