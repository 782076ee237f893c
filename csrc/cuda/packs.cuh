// Packs: what a thread reads and writes at once, and their way to shared memory.
#pragma once

#include <cuda_pipeline.h>

#include <cstdint>

#include "../numeric.h"

namespace fused_ops {

// Neighbours in memory, of kLanes channels. The k-th is of the (k % kLanes)-th.
template <typename T, int kSize_, int kLanes_ = 1>
struct alignas(sizeof(T) * kSize_) Pack {
  static constexpr int kSize = kSize_, kLanes = kLanes_;
  T values[kSize];
};

template <typename P, typename T>
__device__ P load(const T* from, int64_t offset) {
  return *reinterpret_cast<const P*>(from + offset);
}

// To global memory. Without __stcg, which says to L2, where it goes anyway, compilers write 16 bytes in several pieces.
template <typename P, typename T>
__device__ void store(T* to, int64_t offset, const P& pack) {
  if constexpr (sizeof(P) == sizeof(uint4))
    __stcg(reinterpret_cast<uint4*>(to + offset), fused_ops::bit_cast<uint4>(pack));
  else
    *reinterpret_cast<P*>(to + offset) = pack;
}

// Sets out to copy a pack to shared memory, by way of no registers, so that all are under way at once.
template <typename P, typename T>
__device__ void copy_async(P* to, const T* from) {
  if constexpr (sizeof(P) >= 4)
    __pipeline_memcpy_async(to, reinterpret_cast<const P*>(from), sizeof(P));
  else
    *to = *reinterpret_cast<const P*>(from);
}

// Until those that the calling thread set out to copy are there, for itself; for others behind the next barrier.
__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

}  // namespace fused_ops
