// In place of CUDA's header: all blocks of a cooperative launch, and those of a cluster.
#pragma once

#include "machine.h"

namespace cooperative_groups {

struct grid_group {
  void sync(EMULATION_HERE) const { emulation::wait_for_grid({file, line}); }
};

struct cluster_group {
  void sync(EMULATION_HERE) const { emulation::wait(emulation::Barrier::kGroup, {file, line}); }
  template <typename T>
  T* map_shared_rank(T* here, int rank) const {
    return static_cast<T*>(emulation::of_neighbour(rank, here));
  }
};

inline grid_group this_grid() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
