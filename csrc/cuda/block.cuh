// A block of threads that works on one row: its size, its launch, and reductions over its threads.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../checks.h"

namespace fused_ops {

constexpr int kWarp = 32, kMaxWarps = 32;
constexpr int64_t kMaxBlocks = 1 << 20;  // further rows are taken in turns

// Before a kernel's name: it uses no more registers than a block of the largest size has, on every card. (Without the 1
// compilers aim for more blocks at a time, and spill.)
#define FUSED_OPS_ANY_BLOCK __launch_bounds__(kWarp* kMaxWarps, 1)

// Threads for a row of C elements: whole warps, with about four elements a thread.
inline int threads_for(int64_t C) {
  int threads = kWarp;
  while (threads < kWarp * kMaxWarps && threads * 4 < C) threads *= 2;
  return threads;
}

// Launches kernel(args...) on the current stream of the device that `on` lies on, with `memory` bytes of dynamic shared
// memory a block.
template <typename... Parameters, typename... Args>
void launch_with_memory(const Tensor& on, int64_t blocks, int threads, int memory, void (*kernel)(Parameters...),
                        Args... args) {
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (memory > 0) STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory));
  const auto grid = static_cast<unsigned>(std::min(blocks, kMaxBlocks));
  kernel<<<grid, threads, memory, static_cast<cudaStream_t>(stream)>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename... Parameters, typename... Args>
void launch(const Tensor& on, int64_t blocks, int threads, void (*kernel)(Parameters...), Args... args) {
  launch_with_memory(on, blocks, threads, 0, kernel, args...);
}

// Combines the values of `width` neighbouring threads, a power of 2; each of them gets the result. All of a warp call
// it.
template <int width = kWarp, typename V, typename Combine>
__device__ V warp_reduce(V value, const Combine& combine) {
#pragma unroll
  for (int distance = width / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
  return value;
}

// Combines a value from each thread of the block; all of them get the result. The order is fixed, and so the result.
template <typename V, typename Combine>
__device__ V block_reduce(V value, V identity, const Combine& combine) {
  __shared__ V of_warp[kMaxWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  value = warp_reduce(value, combine);
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = warp_reduce(lane < blockDim.x / kWarp ? of_warp[lane] : identity, combine);
  __syncthreads();  // all have read of_warp: the next reduction may write it
  return value;
}

template <typename V>
__device__ V block_sum(V value) {
  return block_reduce(value, V(0), [](V a, V b) { return a + b; });
}

}  // namespace fused_ops
