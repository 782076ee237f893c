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
constexpr int kMaxCluster = 8;                          // blocks: so many can be one wherever there are clusters
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a grid
// Bytes of dynamic shared memory that a block may have unasked: with what its kernel declares less than 48 KiB.
constexpr int64_t kUnaskedMemory = 16 * 1024;

// Before a kernel's name: it uses no more registers than a block of the largest size has, on every card. (Without the 1
// compilers aim for more blocks at a time, and spill.)
#define FUSED_OPS_ANY_BLOCK __launch_bounds__(kWarp* kMaxWarps, 1)

FUSED_OPS_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The least power of 2 that n does not exceed, but not above `most`.
inline int power_of_2(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

// Threads for a row of C elements: whole warps, with about four elements a thread.
inline int threads_for(int64_t C) {
  int threads = kWarp;
  while (threads < kWarp * kMaxWarps && threads * 4 < C) threads *= 2;
  return threads;
}

// How a kernel runs: so many blocks, each of so many threads and with so many bytes of dynamic shared memory; together,
// if all are to be on the card at the same time, so that they can wait for each other; in clusters, if so many blocks
// next to each other are to be on neighbouring processors, so that they can wait for and read from each other.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t memory = 0;
  bool together = false;
  int cluster = 1;
};

// Whether a block of the kernel can have so much dynamic shared memory. If so, from then on it may: always the most
// there is, since a thread of the host that sets less could come between another one's setting and launch.
template <typename Kernel>
bool allow_memory(int device, Kernel* kernel, int64_t memory) {
  if (memory <= kUnaskedMemory) return true;
  int most = 0;
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  most -= static_cast<int>(attributes.sharedSizeBytes);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  return memory <= most;
}

// Whether blocks of the kernel can be clusters: on this device, and by what it was compiled for.
template <typename Kernel>
bool can_cluster(int device, Kernel* kernel) {
  int device_can = 0;
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&device_can, cudaDevAttrClusterLaunch, device));
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return device_can && attributes.ptxVersion >= 90;
}

// How many blocks of the kernel can be together on the device that `on` lies on: 0 if none has so much memory, or if
// the device cannot have them wait for each other.
template <typename Kernel>
int64_t blocks_together(const Tensor& on, Kernel* kernel, int threads, int64_t memory) {
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  int can_wait = 0, processors = 0, of_each = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&can_wait, cudaDevAttrCooperativeLaunch, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  if (!can_wait || !allow_memory(device, kernel, memory)) return 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, memory));
  return int64_t{of_each} * processors;
}

// Launches kernel(args...) on the current stream of the device that `on` lies on.
template <typename... Parameters, typename... Args>
void launch(const Tensor& on, const Grid& grid, void (*kernel)(Parameters...), Args... args) {
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  STD_TORCH_CHECK(grid.blocks <= kMaxBlocks, "expected at most ", kMaxBlocks, " blocks of threads");
  allow_memory(device, kernel, grid.memory);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = grid.together;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(grid.blocks);
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.memory;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = grid.cluster > 1 ? 2 : 1;  // a card without clusters takes no such attribute
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

// The block's dynamic shared memory.
__device__ inline unsigned char* dynamic_memory() {
  extern __shared__ __align__(16) unsigned char shared[];
  return shared;
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
