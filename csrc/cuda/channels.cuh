// A batch (N, C, ...) on the device: how it is dealt out to blocks, the share of each, and the merging of what the
// threads of a block find out about its channels.
#pragma once

#include <initializer_list>

#include "../layout.h"
#include "block.cuh"

namespace fused_ops {

constexpr int kThreads = 256;            // of a block, at most
constexpr int64_t kBlocks = 512;         // these keep a large card at work, and
constexpr int64_t kPacksPerThread = 16;  // this much of a channel a thread: merging blocks costs time, too

// Before a kernel's name: registers for two such blocks at a time, with which none spills. float64 takes more.
#define FUSED_OPS_SMALL_BLOCK(T) __launch_bounds__(kThreads, std::is_same_v<T, double> ? 1 : 2)

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The least power of 2 that n does not exceed, but not above `most`.
inline int power_of_2(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

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
  Tensor empty(bool needed = true) const {
    return needed ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  }
  // Values of the channels, in the accumulate type.
  Tensor empty_vector(bool needed = true) const {
    return torch::stable::new_empty(input, {needed ? layout.channels : 0}, accumulate_type(input.scalar_type()));
  }
};

// A batch as a matrix in row-major order, (N, C·positions), or (N·positions, C) where channels come last. Its columns
// are cut into strips: one channel each or, where channels come last, those that a block has side by side. Each block
// takes a chunk of a strip, some of its rows by some of its columns.
struct Split {
  int64_t channels, positions, rows, columns;
  int threads_across, threads_down;  // of a block: along a row, and in rows of their own
  int threads_apart;                 // the first of a block, which have different channels; further ones repeat these
  int64_t strip_columns, strips;
  Cut down, across;  // a strip's chunks

  // `pack` is the number of elements that a thread takes at once.
  Split(const Layout& l, int pack)
      : channels(l.channels), positions(l.inner), rows(l.outer), columns(channels * positions) {
    const bool channels_last = positions == 1;
    // A warp along a row, if that is long enough; the block, too, where there are few rows.
    const int64_t packs = ceil_div(channels_last ? channels : positions, pack);
    threads_down = power_of_2(rows, kThreads / power_of_2(packs, kWarp));
    threads_across = power_of_2(packs, kThreads / threads_down);
    threads_down = std::max(threads_down, kWarp / threads_across);
    threads_apart = channels_last ? threads_across : 1;

    const int64_t width = int64_t{threads_across} * pack;
    strip_columns = channels_last ? width : positions;
    strips = ceil_div(columns, strip_columns);
    const int64_t packs_per_thread = ceil_div(rows, threads_down) * ceil_div(strip_columns, width);
    const int64_t chunks = std::max<int64_t>(1, std::min(kBlocks / strips, packs_per_thread / kPacksPerThread));
    down = cut(rows, threads_down, chunks);
    across = cut(strip_columns, width, std::max<int64_t>(1, chunks / down.pieces));
  }

  int threads() const { return threads_across * threads_down; }
  FUSED_OPS_HOST_DEVICE int64_t chunks() const { return down.pieces * across.pieces; }
  FUSED_OPS_HOST_DEVICE int64_t blocks() const { return strips * chunks(); }
};

// Room for what each chunk reports of its channels, a V each.
template <typename V, typename Acc>
Tensor empty_reports(const Batch& batch, const Split& split, bool needed) {
  const int64_t size = needed ? split.chunks() * split.channels * int64_t{sizeof(V) / sizeof(Acc)} : 0;
  return torch::stable::new_empty(batch.input, {size}, accumulate_type(batch.input.scalar_type()));
}

// What a thread reads and writes at once: neighbours in memory, of kLanes channels. The k-th is of the (k % kLanes)-th.
template <typename T, int kSize_, int kLanes_>
struct alignas(sizeof(T) * kSize_) Pack {
  static constexpr int kSize = kSize_, kLanes = kLanes_;
  T values[kSize];
};

// Calls f(P{}) with a pack of 16 bytes, or of one element where rows or one of the tensors don't start at such bounds.
template <typename T, typename F>
void dispatch_pack(const Layout& l, std::initializer_list<const void*> tensors, const F& f) {
  constexpr int kSize = 16 / sizeof(T);
  bool aligned = (l.inner == 1 ? l.channels : l.inner) % kSize == 0;
  for (const void* t : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(t) % 16 == 0;
  if (!aligned)
    f(Pack<T, 1, 1>{});
  else if (l.inner == 1)
    f(Pack<T, kSize, kSize>{});
  else
    f(Pack<T, kSize, 1>{});
}

// A block's chunk, and the calling thread's part of it.
template <typename P>
struct Share {
  int64_t chunk, channel;  // the number of the chunk in its strip; the channel of the thread's first lane
  bool reports;            // whether this thread, of all in its block, writes down what its channels have in common
  int64_t row, row_step, row_end, column, column_step, column_end, columns;

  __device__ Share(const Split& split, int64_t block) : columns(split.columns) {
    const int64_t strip = block / split.chunks(), strip_begin = strip * split.strip_columns;
    chunk = block % split.chunks();
    const int64_t chunk_row = chunk / split.across.pieces * split.down.size;
    const int64_t chunk_column = strip_begin + chunk % split.across.pieces * split.across.size;
    const int64_t strip_end = min(strip_begin + split.strip_columns, columns);
    row = chunk_row + threadIdx.x / split.threads_across;
    row_step = split.threads_down;
    row_end = min(chunk_row + split.down.size, split.rows);
    column = chunk_column + threadIdx.x % split.threads_across * P::kSize;
    column_step = int64_t{split.threads_across} * P::kSize;
    column_end = min(chunk_column + split.across.size, strip_end);
    channel = min(column, columns - P::kSize) / split.positions;  // any that exists, where the thread has no elements
    reports = threadIdx.x < split.threads_apart && column < column_end;
  }

  // Calls f(offsets, n) for the thread's packs, with the places in memory of n of them, at most kAtOnce.
  template <int kAtOnce, typename F>
  __device__ void for_packs(const F& f) const {
    if (column >= column_end) return;
    for (int64_t r = row, c = column; r < row_end;) {
      int64_t offsets[kAtOnce];
      int n = 0;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (r >= row_end) break;
        offsets[u] = r * columns + c;
        n = u + 1;
        c += column_step;
        if (c >= column_end) {
          c = column;
          r += row_step;
        }
      }
      f(offsets, n);
    }
  }
};

// The first n packs at these places: all are under way before the first is used.
template <typename P, typename T, int kAtOnce>
__device__ void load(const T* from, const int64_t (&offsets)[kAtOnce], int n, P (&packs)[kAtOnce]) {
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u)
    if (u < n) packs[u] = *reinterpret_cast<const P*>(from + offsets[u]);
}

template <typename P, typename T>
__device__ void store(T* to, int64_t offset, const P& pack) {
  *reinterpret_cast<P*>(to + offset) = pack;
}

// Merges what the threads of a block have of the same channels, always in the same order: then all have it. V is
// trivially copyable and has merge(V).
template <typename V, int kLanes>
__device__ void merge_threads(int threads_apart, V (&lanes)[kLanes]) {
  __shared__ alignas(16) unsigned char storage[sizeof(V) * kLanes * kThreads];
  V(*shared)[kThreads] = reinterpret_cast<V(*)[kThreads]>(storage);
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

// What a block found out about the channels of its chunk, in partial[chunk][channel].
template <typename P, typename V>
__device__ void report(const Split& split, const Share<P>& share, const V (&lanes)[P::kLanes], V* partial) {
  if (!share.reports) return;
#pragma unroll
  for (int l = 0; l < P::kLanes; ++l) partial[share.chunk * split.channels + share.channel + l] = lanes[l];
}

// Calls finish(c, v) with the merged reports v on each channel c, in a kernel of kThreads and so many blocks.
constexpr int kMergedChannels = 8;  // side by side in a block

inline int64_t blocks_to_merge(const Split& split) { return ceil_div(split.channels, kMergedChannels); }

template <typename V, typename Finish>
__device__ void merge_reports(const Split& split, const V* partial, const Finish& finish) {
  for (int64_t first = blockIdx.x; first * kMergedChannels < split.channels; first += gridDim.x) {
    const int64_t c = first * kMergedChannels + threadIdx.x % kMergedChannels;
    V merged[1];
    if (c < split.channels) {
#pragma unroll 4
      for (int64_t chunk = threadIdx.x / kMergedChannels; chunk < split.chunks(); chunk += kThreads / kMergedChannels)
        merged[0].merge(partial[chunk * split.channels + c]);
    }
    merge_threads(kMergedChannels, merged);
    if (threadIdx.x < kMergedChannels && c < split.channels) finish(c, merged[0]);
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
