// In place of CUDA's header: as much of the language and of the runtime as the kernels use.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __stcg(uint4* to, uint4 value) { *to = value; }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678f); }

inline void __syncthreads(EMULATION_HERE) { emulation::wait(emulation::Barrier::kBlock, {file, line}); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, EMULATION_HERE) {
  emulation::exchange(mask, &value, sizeof(T), lane_mask, {file, line});
  return value;
}

// ------------------------------------------------------------------------------------------------------------ runtime

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorCooperativeLaunchTooLarge, cudaErrorLaunchFailure };
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMultiProcessorCount
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulation::Card& card = emulation::card;
  const int values[] = {static_cast<int>(card.shared_memory), card.clusters, 1, card.processors};
  *value = values[attribute];
  return cudaSuccess;
}

struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // of static variables; they are not counted here
  int ptxVersion;
};

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {0, 90};
  return cudaSuccess;
}

// The dynamic shared memory that each kernel may have.
inline std::map<const void*, int64_t> allowed_memory;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulation::card.shared_memory) return cudaErrorInvalidValue;
  allowed_memory[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, size_t bytes) {
  const emulation::Card& card = emulation::card;
  const int64_t by_memory = (card.shared_memory + 1024) / (static_cast<int64_t>(bytes) + 1024);
  *blocks = static_cast<int>(std::min<int64_t>(card.threads / threads, by_memory));
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel's parameters have 4 KiB");
  emulation::Grid grid{config->gridDim, config->blockDim, static_cast<int64_t>(config->dynamicSmemBytes)};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) grid.cooperative = attribute.val.cooperative;
    if (attribute.id == cudaLaunchAttributeClusterDimension) grid.cluster = attribute.val.clusterDim.x;
  }
  const int64_t unasked = 48 * 1024;
  if (grid.dynamic_memory > std::max(unasked, allowed_memory[reinterpret_cast<const void*>(kernel)]) ||
      grid.blocks.x == 0 || grid.threads.x == 0 || grid.threads.x > emulation::kMostThreads ||
      (grid.cluster > 1 && (!emulation::card.clusters || grid.cluster > 8 || grid.blocks.x % grid.cluster)))
    return cudaErrorInvalidValue;
  int of_each = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, grid.threads.x, grid.dynamic_memory);
  if (grid.cooperative && int64_t{grid.blocks.x} > int64_t{of_each} * emulation::card.processors)
    return cudaErrorCooperativeLaunchTooLarge;

  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, {static_cast<Parameters>(args)...}};
  const auto run = [](const void* of) {
    const auto& [kernel, parameters] = *static_cast<const Call*>(of);
    std::apply(kernel, parameters);
  };
  return emulation::launch(grid, run, &call, sizeof(call)) ? cudaSuccess : cudaErrorLaunchFailure;
}
