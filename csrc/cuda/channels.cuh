// A batch (N, C, ...) on the device: how it is dealt out to blocks, the share of each, and the merging of what the
// threads of a block, and all blocks, find out about its channels.
#pragma once

#include <cooperative_groups.h>

#include <initializer_list>

#include "../empty.h"
#include "../layout.h"
#include "block.cuh"
#include "packs.cuh"

namespace fused_ops {

constexpr int kThreads = 256;            // of a block, at most
constexpr int64_t kBlocks = 512;         // of a grid, where they need not be together: enough for a large card
constexpr int64_t kPacksPerThread = 16;  // at least, of a channel that has several blocks: merging them costs time, too

// Before a kernel's name: registers for two such blocks at a time, with which none spills. float64 takes more.
#define FUSED_OPS_SMALL_BLOCK(T) __launch_bounds__(kThreads, std::is_same_v<T, double> ? 1 : 2)

// Elements cut into pieces of `size`, the last perhaps smaller.
struct Cut {
  int64_t size, pieces;
};

// Into at most `most` pieces, of whole units.
inline Cut cut(int64_t elements, int64_t unit, int64_t most) {
  const int64_t units = std::max<int64_t>(1, ceil_div(elements, unit)),
                size = ceil_div(units, std::min(units, most)) * unit;
  return {size, std::max<int64_t>(1, ceil_div(elements, size))};
}

// A batch on the device, in one of the layouts that kernels know, and other tensors of its shape in the same.
struct Batch {
  Tensor input;
  bool channels_last;
  Layout layout;

  explicit Batch(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() >= 2, "input should be (N, C, ...)");
    channels_last = !x.is_contiguous() && is_like_channels_last(x);
    input = dense(x, channels_last);
    layout = layout_of(input, channels_last);
    if (input.numel() == 0)
      layout = {0, layout.channels, 1};
    else if (layout.channels == 1)
      layout = {1, 1, input.numel()};  // a single row
  }

  Tensor alike(const Tensor& t, const char* name) const {
    check_same_device(t, input, name);
    return in_layout_of(input, channels_last, t, name);
  }

  // Like the input, or (0,) where it is not needed.
  Tensor empty(bool needed = true) const { return empty_like_dense(input, needed); }
  // Values of the channels, in the accumulate type, or (0,).
  Tensor empty_vector(bool needed) const {
    return empty_beside(input, {needed ? layout.channels : 0}, accumulate_type(input.scalar_type()));
  }
};

// A batch as a matrix in row-major order, (N, C·positions), or (N·positions, C) where channels come last. Its columns
// are cut into strips: one channel each or, where channels come last, those that a block has side by side. Each block
// takes a chunk of a strip, some of its rows by some of its columns.
struct Split {
  int64_t channels, positions, rows, columns;
  int threads_across, threads_down;  // of a block: along a row, and in rows of their own
  int threads_apart;                 // the first of a block, which have different channels; further ones repeat these
  int64_t width, strip_columns, strips;  // width: columns that a block has side by side
  Cut down, across;                      // a strip's chunks

  // Into whole strips. `pack` is the number of elements that a thread takes at once.
  Split(const Layout& l, int pack)
      : channels(l.channels), positions(l.inner), rows(l.outer), columns(channels * positions) {
    const bool channels_last = positions == 1;
    // A warp along a row, if that is long enough; the block, too, where there are few rows.
    const int64_t packs = ceil_div(channels_last ? channels : positions, pack);
    threads_down = power_of_2(rows, kThreads / power_of_2(packs, kWarp));
    threads_across = power_of_2(packs, kThreads / threads_down);
    threads_down = std::max(threads_down, kWarp / threads_across);
    threads_apart = channels_last ? threads_across : 1;

    width = int64_t{threads_across} * pack;
    strip_columns = channels_last ? width : positions;
    strips = ceil_div(columns, strip_columns);
    cut_strips(1);
  }

  // Into so many chunks, or few less: by rows first, but for what few rows leave over.
  void cut_strips(int64_t most) {
    down = across = {0, 0};
    for (int64_t of_rows = most; of_rows > 0 && chunks() < most; of_rows /= 2) {
      const Cut by_rows = cut(rows, threads_down, of_rows),
                by_columns = cut(strip_columns, width, most / by_rows.pieces);
      if (by_rows.pieces * by_columns.pieces <= chunks()) continue;
      down = by_rows;
      across = by_columns;
    }
  }

  // Of a thread's share, at most.
  int64_t packs() const { return ceil_div(down.size, threads_down) * ceil_div(across.size, width); }
  int threads() const { return threads_across * threads_down; }
  FUSED_OPS_HOST_DEVICE int64_t chunks() const { return down.pieces * across.pieces; }
  FUSED_OPS_HOST_DEVICE int64_t blocks() const { return strips * chunks(); }
};

// Calls f(P{}) with a pack of 16 bytes, or of one element where rows or one of the tensors don't start at such bounds.
// Of images of 14 x 14 and 16 bits, say, rows start at bounds of 8 bytes: these have packs of their own.
template <typename T, typename F>
void dispatch_pack(const Layout& l, std::initializer_list<const void*> tensors, const F& f) {
  constexpr int kSize = 16 / sizeof(T);
  const auto aligned = [&](int size) {
    bool all = (l.inner == 1 ? l.channels : l.inner) % size == 0;
    for (const void* t : tensors) all = all && reinterpret_cast<uintptr_t>(t) % (size * sizeof(T)) == 0;
    return all;
  };
  if (aligned(kSize)) {
    if (l.inner == 1)
      f(Pack<T, kSize, kSize>{});
    else
      f(Pack<T, kSize, 1>{});
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (l.inner != 1 && aligned(kSize / 2)) return f(Pack<T, kSize / 2, 1>{});
  }
  f(Pack<T, 1, 1>{});
}

// Some of a thread's packs: the number of the first, how many, and where in memory they lie.
template <int kAtOnce>
struct Places {
  int first, n;
  int64_t offsets[kAtOnce];
};

// A block's chunk, and the calling thread's part of it: row after row, each threads_down below the last.
template <typename P>
struct Share {
  int64_t chunk, channel;     // the number of the chunk in its strip; the channel of the thread's first lane
  bool reports;               // whether this thread, of all in its block, writes down what its channels have in common
  int of_row, packs;          // in a row, and in all: a device's memory ends long before this type does
  int64_t begin, step, wrap;  // in memory: the first pack's place, from one to the next, and to the next row's

  __device__ explicit Share(const Split& split) {
    const int64_t strip = blockIdx.x / split.chunks(), strip_begin = strip * split.strip_columns;
    chunk = blockIdx.x % split.chunks();
    const int64_t chunk_row = chunk / split.across.pieces * split.down.size;
    const int64_t chunk_column = strip_begin + chunk % split.across.pieces * split.across.size;
    const int64_t strip_end = min(strip_begin + split.strip_columns, split.columns);
    const int64_t row = chunk_row + threadIdx.x / split.threads_across;
    const int64_t rows = min(chunk_row + split.down.size, split.rows) - row;
    const int64_t column = chunk_column + threadIdx.x % split.threads_across * P::kSize;
    const int64_t columns = min(chunk_column + split.across.size, strip_end) - column;
    channel = min(column, split.columns - P::kSize) / split.positions;  // any that exists, where there are no packs
    reports = threadIdx.x < split.threads_apart && columns > 0;
    of_row = static_cast<int>(ceil_div(max(columns, int64_t{0}), split.width));
    packs = static_cast<int>(ceil_div(max(rows, int64_t{0}), split.threads_down)) * of_row;
    begin = row * split.columns + column;
    step = split.width;
    wrap = split.threads_down * split.columns - (of_row - 1) * step;
  }

  // From here on the last pack comes first: of what a block has read it is the likeliest to be still in the L2 cache.
  __device__ void reverse() {
    if (packs == 0) return;
    const int64_t along_row = (of_row - 1) * step;
    begin += (packs / of_row - 1) * (along_row + wrap) + along_row;
    step = -step;
    wrap = -wrap;
  }

  // Calls f(places) for the thread's packs, at most kAtOnce at a time.
  template <int kAtOnce, typename F>
  __device__ void for_packs(const F& f) const {
    int64_t offset = begin;
    int in_row = 0;
    for (int first = 0; first < packs; first += kAtOnce) {
      Places<kAtOnce> places;
      places.first = first;
      places.n = min(kAtOnce, packs - first);
#pragma unroll
      for (int64_t& place : places.offsets) {
        place = offset;
        const bool wraps = ++in_row == of_row;
        in_row = wraps ? 0 : in_row;
        offset += wraps ? wrap : step;
      }
      f(places);
    }
  }
};

// The packs at these places: all are under way before the first is used.
template <typename P, typename T, int kAtOnce>
__device__ void load(const T* from, const Places<kAtOnce>& places, P (&packs)[kAtOnce]) {
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u)
    if (u < places.n) packs[u] = load<P>(from, places.offsets[u]);
}

// What a launch does: it finds what the elements of a channel have in common, or applies it to each of them, or both.
struct Task {
  bool finds, applies;
  int keeps;  // in between, in shared memory: so many packs a thread of each tensor. If 0, both halves read the tensor
};

// A tensor that both halves of a task read, the number-th of these.
template <typename P, typename T>
struct TwiceRead {
  const Task& task;
  const T* tensor;
  int number;

  // The thread's packs in shared memory from `first` on, kThreads apart. No other thread waits for them.
  __device__ P* kept(int first) const {
    return reinterpret_cast<P*>(dynamic_memory()) + (number * task.keeps + first) * kThreads + threadIdx.x;
  }

  // Sets out to fill it. wait_for_copies() is when it's there.
  __device__ void keep(const Share<P>& share) const {
    if (!task.keeps) return;
    share.template for_packs<1>(
        [&](const Places<1>& place) { copy_async(kept(place.first), tensor + place.offsets[0]); });
  }

  template <int kAtOnce>
  __device__ void load(const Places<kAtOnce>& places, P (&packs)[kAtOnce]) const {
    if (!task.keeps) return fused_ops::load(tensor, places, packs);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (u < places.n) packs[u] = kept(places.first)[u * kThreads];
  }
};

// Where threads put what others are to merge.
template <typename V, int kLanes>
__device__ auto merge_room() {
  __shared__ __align__(16) unsigned char storage[sizeof(V) * kLanes * kThreads];
  return reinterpret_cast<V(*)[kThreads]>(storage);
}

// Merges what the threads of a block have of the same channels, always in the same order: then all have it. V is
// trivially copyable and has merge(V).
template <typename V, int kLanes>
__device__ void merge_threads(int threads_apart, V (&lanes)[kLanes]) {
  V(*shared)[kThreads] = merge_room<V, kLanes>();
  const int thread = threadIdx.x;
  const auto put = [&] {
#pragma unroll
    for (int l = 0; l < kLanes; ++l) shared[l][thread] = lanes[l];
  };
  for (int distance = blockDim.x / 2; distance >= threads_apart; distance /= 2) {
    if (thread >= distance && thread < 2 * distance) put();
    __syncthreads();
    if (thread < distance) {
#pragma unroll
      for (int l = 0; l < kLanes; ++l) lanes[l].merge(shared[l][thread + distance]);
    }
  }
  if (thread < threads_apart) put();  // where nobody has, so far
  __syncthreads();
#pragma unroll
  for (int l = 0; l < kLanes; ++l) lanes[l] = shared[l][thread % threads_apart];
  __syncthreads();  // all have read: a next merge may write anywhere
}

// Merges what the blocks of a cluster have, each of its own chunk of the same channels, always in the same order: then
// all have it. `lanes` are those of merge_threads.
template <typename V, int kLanes>
__device__ void merge_cluster(int blocks, int threads_apart, V (&lanes)[kLanes]) {
#if __CUDA_ARCH__ >= 900
  if (blocks == 1) return;
  V(*shared)[kThreads] = merge_room<V, kLanes>();
  const auto cluster = cooperative_groups::this_cluster();
  const int thread = threadIdx.x;
#pragma unroll
  for (int l = 0; l < kLanes; ++l) {
    if (thread < threads_apart) shared[l][thread] = lanes[l];
    lanes[l] = V{};
  }
  cluster.sync();
  for (int block = 0; block < blocks; ++block) {
#pragma unroll
    for (int l = 0; l < kLanes; ++l)
      lanes[l].merge(*cluster.map_shared_rank(&shared[l][thread % threads_apart], block));
  }
  cluster.sync();  // all have read: the block may end
#endif
}

// Merges what blocks that are together have of their chunks' channels, and calls finish(c, v) once for each channel c,
// always in the same order. `partial` has room for a V of each chunk and channel.
template <typename P, typename V, typename Finish>
__device__ void merge_blocks(const Split& split, const Share<P>& share, const V (&lanes)[P::kLanes], V* partial,
                             const Finish& finish) {
  if (share.reports) {
#pragma unroll
    for (int l = 0; l < P::kLanes; ++l) partial[share.chunk * split.channels + share.channel + l] = lanes[l];
  }
  cooperative_groups::this_grid().sync();

  constexpr int kSideBySide = 8;  // channels that a block merges at once
  for (int64_t first = int64_t{blockIdx.x} * kSideBySide; first < split.channels; first += gridDim.x * kSideBySide) {
    const int64_t c = first + threadIdx.x % kSideBySide;
    V merged[1];
    if (c < split.channels) {
#pragma unroll 4
      for (int64_t chunk = threadIdx.x / kSideBySide; chunk < split.chunks(); chunk += blockDim.x / kSideBySide)
        merged[0].merge(partial[chunk * split.channels + c]);
    }
    merge_threads(kSideBySide, merged);
    if (threadIdx.x < kSideBySide && c < split.channels) finish(c, merged[0]);
  }
  cooperative_groups::this_grid().sync();  // all is finished
}

// Has a kernel go over a batch. `merges`: the elements of a channel have something in common, a V, that is to be found.
// `twice_read`: so many tensors are read for this and then to apply it; 0 if nothing is to be applied.
//
// A block, or a cluster of blocks, that takes whole channels finds and applies in one go. Of many channels only some
// are under way at a time then: what is read again is still in the L2 cache, or in shared memory where there is enough
// for as many blocks as without. Where there are few channels all blocks share them and have to merge what they find:
// so they run together. Then they apply it if they can keep what they have read; else a second launch does.
template <typename P, typename V, typename... Parameters, typename... Args>
void launch_over(const Batch& batch, bool merges, int twice_read, void (*kernel)(Split, Task, V*, Parameters...),
                 Args... args) {
  Split split(batch.layout, P::kSize);
  const auto device = batch.input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto together = [&](int64_t memory) { return blocks_together(batch.input, kernel, split.threads(), memory); };
  const auto memory_to_keep = [&] { return twice_read * split.packs() * kThreads * int64_t{sizeof(P)}; };
  const int64_t chunks = std::max<int64_t>(1, split.packs() / kPacksPerThread);
  const bool applies = twice_read > 0;
  if (!merges) {
    split.cut_strips(std::clamp<int64_t>(kBlocks / split.strips, 1, chunks));
    return launch(batch.input, {split.blocks(), split.threads()}, kernel, split, Task{true, applies, 0}, nullptr,
                  args...);
  }

  // The driver is not asked about small batches, for which that would take a good part of the time.
  const bool is_small = chunks == 1 && memory_to_keep() <= kUnaskedMemory;
  const int64_t at_once = is_small ? 0 : together(0);
  const int64_t of_cluster = chunks > 1 && can_cluster(device, kernel) ? std::min<int64_t>(chunks, kMaxCluster) : 1;
  if (chunks == 1 || 2 * split.strips * of_cluster >= at_once) {
    split.cut_strips(of_cluster);
    const int64_t memory = memory_to_keep();
    const bool keeps = applies && (memory <= kUnaskedMemory || together(memory) == at_once);
    const Task both{true, applies, keeps ? static_cast<int>(split.packs()) : 0};
    const Grid grid{split.blocks(), split.threads(), keeps ? memory : 0, false, static_cast<int>(split.chunks())};
    return launch(batch.input, grid, kernel, split, both, nullptr, args...);
  }

  split.cut_strips(std::clamp<int64_t>(at_once / split.strips, 1, chunks));
  Tensor reports = empty_beside(batch.input, {split.chunks() * split.channels * int64_t{sizeof(V)}}, ScalarType::Byte);
  V* partial = static_cast<V*>(reports.mutable_data_ptr());
  const Grid grid{split.blocks(), split.threads(), 0, true};
  if (const int64_t memory = memory_to_keep(); together(memory) >= grid.blocks) {
    const Task both{true, applies, applies ? static_cast<int>(split.packs()) : 0};
    launch(batch.input, {grid.blocks, grid.threads, memory, true}, kernel, split, both, partial, args...);
  } else {
    launch(batch.input, grid, kernel, split, Task{true, false, 0}, partial, args...);
    launch(batch.input, {grid.blocks, grid.threads}, kernel, split, Task{false, true, 0}, partial, args...);
  }
}

// A (C,) tensor on the device, in T or in its accumulate type; or none.
template <typename T, typename Acc = accumulate_t<T>>
class ChannelVector {
 public:
  ChannelVector(const std::optional<Tensor>& v, const Tensor& input, const char* name, bool written = false) {
    if (!v) return;
    wide_ = v->scalar_type() == accumulate_type(input.scalar_type());
    STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == input.size(1) && (wide_ || v->scalar_type() == input.scalar_type()),
                    name, " should be a vector of ", input.size(1), " elements, of the input's dtype or float32");
    check_same_device(*v, input, name);
    stride_ = v->stride(0);
    data_ = written ? v->mutable_data_ptr() : const_cast<void*>(v->const_data_ptr());
  }

  __device__ explicit operator bool() const { return data_; }
  __device__ Acc get(int64_t c, Acc missing = 0) const {
    if (!data_) return missing;
    return wide_ ? static_cast<const Acc*>(data_)[c * stride_] : widen(static_cast<const T*>(data_)[c * stride_]);
  }
  __device__ void set(int64_t c, Acc value) const {
    if (wide_)
      static_cast<Acc*>(data_)[c * stride_] = value;
    else
      static_cast<T*>(data_)[c * stride_] = narrow<T>(value);
  }

 private:
  void* data_ = nullptr;
  int64_t stride_ = 0;
  bool wide_ = false;
};

}  // namespace fused_ops
