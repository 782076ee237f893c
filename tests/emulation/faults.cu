// Kernels that have a mistake each: for the tests of the emulation, which is to find it. And the card, to be changed.
#include <cooperative_groups.h>

#include <cassert>

#include "../../csrc/cuda/block.cuh"
#include "../../csrc/cuda/packs.cuh"
#include "../../csrc/name.h"

namespace {

using namespace fused_ops;

// What the kernels take: as many floats as there are threads, in all blocks, and floats that are only to be read.
struct Data {
  float* x;
  const float* fixed;
};

__device__ int thread_of_grid() { return blockIdx.x * blockDim.x + threadIdx.x; }

__global__ void none(Data data) {
  __shared__ float shared[kMaxWarps * kWarp];
  shared[threadIdx.x] = data.fixed[thread_of_grid()];
  __syncthreads();
  data.x[thread_of_grid()] = shared[blockDim.x - 1 - threadIdx.x];
  cooperative_groups::this_grid().sync();
  const float other = data.x[gridDim.x * blockDim.x - 1 - thread_of_grid()];
  cooperative_groups::this_grid().sync();
  data.x[thread_of_grid()] = warp_reduce(other, [](float a, float b) { return a + b; });
}

__global__ void no_barrier(Data data) {
  __shared__ float shared[kMaxWarps * kWarp];
  shared[threadIdx.x] = 1;
  data.x[thread_of_grid()] = shared[threadIdx.x ^ 1];
}

__global__ void no_second_barrier(Data data) {
  __shared__ float shared;
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) shared = i;
    __syncthreads();
    data.x[thread_of_grid()] = shared;
  }
}

// It orders what threads run, but not what they do to memory.
__global__ void exchange_for_barrier(Data data) {
  __shared__ float shared[kMaxWarps * kWarp];
  shared[threadIdx.x] = 1;
  const float sum = warp_reduce(1.0f, [](float a, float b) { return a + b; });
  data.x[thread_of_grid()] = sum + shared[threadIdx.x ^ 1];
}

__global__ void block_barrier_for_grid(Data data) {
  data.x[thread_of_grid()] = 1;
  __syncthreads();
  data.x[thread_of_grid()] = data.x[gridDim.x * blockDim.x - 1 - thread_of_grid()];
}

__global__ void not_written(Data data) {
  __shared__ float shared[2];
  if (threadIdx.x == 0) shared[0] = 1;
  __syncthreads();
  data.x[thread_of_grid()] = shared[threadIdx.x % 2];
}

__global__ void different_barriers(Data) {
  if (threadIdx.x < blockDim.x / 2)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void early_end(Data) {
  if (threadIdx.x == 0) return;
  __syncthreads();
}

__global__ void part_of_warp(Data data) {
  if (threadIdx.x % 2) data.x[thread_of_grid()] = __shfl_xor_sync(0xffffffff, 1.0f, 2);
}

__global__ void barrier_in_part_of_warp(Data data) {
  if (threadIdx.x % 2)
    data.x[thread_of_grid()] = __shfl_xor_sync(0xffffffff, 1.0f, 2);
  else
    __syncthreads();
}

__global__ void out_of_bounds(Data data) { data.x[thread_of_grid()] = data.fixed[thread_of_grid() + 1]; }

__global__ void write_to_fixed(Data data) { const_cast<float*>(data.fixed)[thread_of_grid()] = 1; }

__global__ void misaligned(Data data) {
  if (thread_of_grid() == 0) store(data.x, 0, load<Pack<float, 4>>(data.fixed, 1));
}

__global__ void misaligned_copy(Data data) {
  __shared__ __align__(16) float shared[8];
  if (threadIdx.x == 0) copy_async(reinterpret_cast<Pack<float, 4>*>(shared), data.fixed + 1);
  wait_for_copies();
}

__global__ void beyond_array(Data data) {
  __shared__ float shared[64], next[64];
  next[threadIdx.x] = shared[threadIdx.x] = 1;
  __syncthreads();
  data.x[thread_of_grid()] = next[threadIdx.x] + shared[threadIdx.x + 1];
}

__global__ void overflow(Data data) {
  data.x[thread_of_grid()] = static_cast<int>(data.fixed[threadIdx.x]) * 100000000;
}

__global__ void beyond_dynamic_memory(Data) { dynamic_memory()[threadIdx.x * 8 + 8] = 1; }

__global__ void copy_before_it_is_there(Data data) {
  __shared__ float shared[kMaxWarps * kWarp];
  copy_async(reinterpret_cast<Pack<float, 1>*>(shared + threadIdx.x), data.fixed + thread_of_grid());
  data.x[thread_of_grid()] = shared[threadIdx.x];
  wait_for_copies();
}

__global__ void copy_without_waiting(Data data) {
  __shared__ float shared[kMaxWarps * kWarp];
  copy_async(reinterpret_cast<Pack<float, 1>*>(shared + threadIdx.x), data.fixed + thread_of_grid());
}

__global__ void copy_without_barrier(Data data) {
  __shared__ float shared[kMaxWarps * kWarp];
  copy_async(reinterpret_cast<Pack<float, 1>*>(shared + threadIdx.x), data.fixed + thread_of_grid());
  wait_for_copies();
  data.x[thread_of_grid()] = shared[threadIdx.x ^ 1];
}

__global__ void end_before_neighbour_has_read(Data data) {
  __shared__ float shared;
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) shared = blockIdx.x;
  cluster.sync();
  data.x[thread_of_grid()] = *cluster.map_shared_rank(&shared, 1 - blockIdx.x % 2);
}

__global__ void no_such_neighbour(Data data) {
  __shared__ float shared;
  data.x[thread_of_grid()] = *cooperative_groups::this_cluster().map_shared_rank(&shared, 2);
}

__global__ void assertion(Data data) { assert(data.fixed[thread_of_grid()] < 0); }

constexpr int kThreadsOfFault = 64;

#define FAULT(kernel) {#kernel, kernel}
constexpr std::pair<const char*, void (*)(Data)> kFaults[] = {
    FAULT(none),
    FAULT(no_barrier),
    FAULT(no_second_barrier),
    FAULT(exchange_for_barrier),
    FAULT(block_barrier_for_grid),
    FAULT(not_written),
    FAULT(different_barriers),
    FAULT(early_end),
    FAULT(part_of_warp),
    FAULT(barrier_in_part_of_warp),
    FAULT(out_of_bounds),
    FAULT(write_to_fixed),
    FAULT(misaligned),
    FAULT(misaligned_copy),
    FAULT(beyond_array),
    FAULT(overflow),
    FAULT(beyond_dynamic_memory),
    FAULT(copy_before_it_is_there),
    FAULT(copy_without_waiting),
    FAULT(copy_without_barrier),
    FAULT(end_before_neighbour_has_read),
    FAULT(no_such_neighbour),
    FAULT(assertion),
};

// Runs the kernel of this name, over as many blocks as x has elements for.
void fault(Name name, Tensor x, Tensor fixed, bool together, int64_t cluster) {
  const Data data{x.mutable_data_ptr<float>(), fixed.const_data_ptr<float>()};
  for (const auto& [known, kernel] : kFaults)
    if (known == name)
      return launch(x, {x.numel() / kThreadsOfFault, kThreadsOfFault, 512, together, static_cast<int>(cluster)}, kernel,
                    data);
  STD_TORCH_CHECK(false, "there is no fault of this name");
}

void set_card(int64_t threads, int64_t shared_memory, bool clusters) {
  emulation::card.threads = static_cast<int>(threads);
  emulation::card.shared_memory = shared_memory;
  emulation::card.clusters = clusters;
}

}  // namespace

STABLE_TORCH_LIBRARY(emulation, m) {
  m.def("fault(str name, Tensor(a!) x, Tensor fixed, bool together, int cluster) -> ()");
  m.def("set_card(int threads, int shared_memory, bool clusters) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(emulation, CUDA, m) { m.impl("fault", TORCH_BOX(&fault)); }
STABLE_TORCH_LIBRARY_IMPL(emulation, CompositeExplicitAutograd, m) { m.impl("set_card", TORCH_BOX(&set_card)); }
