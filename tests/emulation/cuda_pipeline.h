// In place of CUDA's header. A copy is there as late as it may be: when its thread waits for it.
#pragma once

#include "machine.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulation::copy_async(to, from, bytes);
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) { emulation::wait_for_copies(); }
