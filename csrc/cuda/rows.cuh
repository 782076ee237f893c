// Rows of classes on the device: how they are dealt out to blocks, the part of a row that a block has, and what its
// threads, and the blocks of the row's other parts, find out together.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "block.cuh"
#include "packs.cuh"

namespace fused_ops {

constexpr int kThreadsSideBySide = 128;             // of a block that has several rows, each with a warp at most
constexpr int64_t kMostOfWarp = 1024;               // elements of such a row
constexpr int64_t kMostClasses = int64_t{1} << 30;  // elements of a part are counted in 32 bits

// Of a part, where a row can have so many. An H100 has room for three such blocks on a processor, of which some compute
// while others wait for memory. A block that has more of a row has fewer beside it, and more threads.
constexpr int64_t kPartBytes = 72 * 1024;
constexpr int kMostThreads = 512, kThreadsOfPart = 256;

// Before a kernel's name: registers for two of the largest blocks at a time. float64 takes more.
#define FUSED_OPS_ROW_BLOCK(T) __launch_bounds__(kMostThreads, std::is_same_v<T, double> ? 1 : 2)

// How rows are dealt out. A row has some threads of a block; or a block; or the blocks of a cluster, each with a part.
struct Deal {
  int width, parts;    // threads of a row in a block; blocks of a row
  int64_t size;        // elements of a part, but for the last
  int64_t part_bytes;  // of shared memory, for a block's part of each of its rows; 0 if it is not kept, but read again
};

// What a block has of a row, or of one of several rows side by side, and a thread's place there. Elements are counted
// from the first of the part, in 32 bits, for which a GPU takes half as many steps as for 64.
template <typename T>
struct Part {
  static constexpr int kPack = 16 / sizeof(T);
  int64_t n, first;  // the row, and the first class of the part
  int64_t start;     // in memory, of all rows
  int count;         // of elements; none where there are no more rows
  int rank, width, parts;
  const T* x;

  __device__ Part(const Deal& deal, const T* rows, int64_t N, int64_t C)
      : rank(threadIdx.x % deal.width), width(deal.width), parts(deal.parts) {
    n = int64_t{blockIdx.x} / parts * (blockDim.x / width) + threadIdx.x / width;
    first = blockIdx.x % parts * deal.size;
    count = n < N ? static_cast<int>(max(int64_t{0}, min(deal.size, C - first))) : 0;
    start = n < N ? n * C + first : 0;
    x = rows + start;
  }

  // Reads the part, to where x then is. All threads of the block call it.
  __device__ void keep(const Deal& deal) {
    if (!deal.part_bytes) return;
    T* kept = reinterpret_cast<T*>(dynamic_memory() + threadIdx.x / width * deal.part_bytes) + beyond_bound(x);
    for_packs([&](int c, auto size) { copy_async(reinterpret_cast<Pack<T, size()>*>(kept + c), x + c); });
    wait_for_copies();
    __syncthreads();
    x = kept;
  }

  // Calls f(c, size) for each c from which on there are `size` elements for the thread: kPack of them, where a pack
  // begins in all the arrays (null for none), and single ones before and after. No two threads have the same elements;
  // which they have depends on where memory begins.
  template <typename F, typename... Arrays>
  __device__ void for_packs(const F& f, const Arrays*... arrays) const {
    const int before = (kPack - beyond_bound(x)) % kPack;
    const bool alike = ((!arrays || beyond_bound(arrays) == beyond_bound(x)) && ...);
    const int head = alike ? min(before, count) : count, in_packs = (count - head) / kPack * kPack;
    for (int c = head + rank * kPack; c < head + in_packs; c += width * kPack)
      f(c, std::integral_constant<int, kPack>{});
    for (int i = rank; i < count - in_packs; i += width)
      f(i < head ? i : i + in_packs, std::integral_constant<int, 1>{});
  }

  // Calls f(c, k, x_c) for the thread's elements, widened, each the k-th of a pack: by the same threads in the same
  // order wherever the part lies, so that sums are the same, too. Those of each k make a chain of additions.
  template <typename F>
  __device__ void for_elements(const F& f) const {
    const bool in_packs = beyond_bound(x) == 0;
    const int whole = count / kPack * kPack;
    for (int c = rank * kPack; c < whole; c += width * kPack) {
      Pack<accumulate_t<T>, kPack> pack;
      if (in_packs) {
        pack = widen(load<Pack<T, kPack>>(x, c));
      } else {
#pragma unroll
        for (int k = 0; k < kPack; ++k) pack.values[k] = widen(x[c + k]);
      }
#pragma unroll
      for (int k = 0; k < kPack; ++k) f(c + k, k, pack.values[k]);
    }
    for (int c = whole + rank; c < count; c += width) f(c, 0, widen(x[c]));
  }

  // Combines a value from each thread that has elements of the row, in all its parts; all of them get the result. The
  // order is fixed, and so the result. All threads of the block call it.
  template <typename V, typename Combine>
  __device__ V reduce(V value, V identity, const Combine& combine) const {
    if (width < blockDim.x) {  // rows side by side
      for (int distance = width / 2; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(0xffffffff, value, distance));
      return value;
    }
    value = block_reduce(value, identity, combine);
#if __CUDA_ARCH__ >= 900
    if (parts > 1) {
      __shared__ V of_block;
      const auto cluster = cooperative_groups::this_cluster();
      if (threadIdx.x == 0) of_block = value;
      cluster.sync();
      const int other = threadIdx.x % kWarp;
      value = warp_reduce(other < parts ? *cluster.map_shared_rank(&of_block, other) : identity, combine);
      cluster.sync();  // all have read of_block: it may be written again, and its block may end
    }
#endif
    return value;
  }

  // The sum of the values of each k, and of those of all threads.
  template <typename V>
  __device__ V sum(V (&values)[kPack]) const {
#pragma unroll
    for (int n = kPack / 2; n > 0; n /= 2)
#pragma unroll
      for (int k = 0; k < n; ++k) values[k] += values[k + n];
    return reduce(values[0], V(0), [](V a, V b) { return a + b; });
  }

 private:
  // How many elements behind a bound of 16 bytes.
  __device__ static int beyond_bound(const void* at) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(at) % 16 / sizeof(T));
  }
};

// Has a kernel go over N rows of C elements.
template <typename T, typename... Parameters, typename... Args>
void launch_rows(const Tensor& on, int64_t N, int64_t C, void (*kernel)(Deal, Parameters...), Args... args) {
  if (N == 0) return;
  STD_TORCH_CHECK(C <= kMostClasses, "expected at most ", kMostClasses, " classes");
  const auto device = on.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool side_by_side = C <= kMostOfWarp;
  Deal deal;
  deal.parts = side_by_side ? 1 : power_of_2(ceil_div(C * int64_t{sizeof(T)}, kPartBytes), kMaxCluster);
  if (deal.parts > 1 && !can_cluster(device, kernel)) deal.parts = 1;
  deal.size = ceil_div(ceil_div(C, deal.parts), Part<T>::kPack) * Part<T>::kPack;  // so that parts begin alike
  deal.part_bytes = (deal.size + Part<T>::kPack) * int64_t{sizeof(T)};  // one pack more, as a part may begin in one
  const int most = deal.part_bytes > kPartBytes ? kMostThreads : kThreadsOfPart;
  deal.width = side_by_side ? power_of_2(ceil_div(C, 4), kWarp) : power_of_2(ceil_div(deal.size, 32), most);

  const int threads = side_by_side ? kThreadsSideBySide : deal.width;
  const int64_t rows = threads / deal.width;  // of a block
  if (!allow_memory(device, kernel, rows * deal.part_bytes)) deal.part_bytes = 0;
  const Grid grid{ceil_div(N, rows) * deal.parts, threads, rows * deal.part_bytes, false, deal.parts};
  launch(on, grid, kernel, deal, args...);
}

}  // namespace fused_ops
