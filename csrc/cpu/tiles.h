// A batch in memory, cut into tiles: the loops over a tile, and the passes over all of them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../layout.h"
#include "parallel.h"
#include "stream.h"
#include "vectorize.h"

namespace fused_ops {

// A range of the outer dimension, of the channels and of the inner dimension.
struct Tile {
  int64_t o_begin, o_end, c_begin, c_end, i_begin, i_end;

  int64_t rows() const { return o_end - o_begin; }
  int64_t size() const { return rows() * (c_end - c_begin) * (i_end - i_begin); }
};

// The size of parts, none larger than `most`, that are about alike.
inline int64_t even_size(int64_t size, int64_t most) {
  return std::max<int64_t>(1, ceil_div(size, std::max<int64_t>(1, ceil_div(size, most))));
}

// f(c, index) for each element of a tile, at this index in memory. The inner loop runs along memory: over channels
// where they come last, else over a channel's positions.
template <typename F>
inline void for_each(const Layout& l, const Tile& t, const F& f) {
  for (int64_t o = t.o_begin; o < t.o_end; ++o) {
    if (l.inner == 1) {
      const int64_t index = o * l.channels;
#pragma omp simd
      for (int64_t c = t.c_begin; c < t.c_end; ++c) f(c, index + c);
    } else {
      for (int64_t c = t.c_begin; c < t.c_end; ++c) {
        const int64_t index = (o * l.channels + c) * l.inner;
#pragma omp simd
        for (int64_t i = t.i_begin; i < t.i_end; ++i) f(c, index + i);
      }
    }
  }
}

// out[index] = value(c, index) for each element of a tile: at once or, if all of them have so many bytes, in runs of
// memory that are streamed.
template <typename T, typename Value>
inline void write_each(const Layout& l, const Tile& t, T* out, const Value& value, int64_t streamed_from = kStreamed) {
  constexpr int64_t kRun = 4096 / sizeof(T);
  alignas(64) T run[kRun];
  int64_t o_size = t.rows(), c_size = t.c_end - t.c_begin, i_size = t.i_end - t.i_begin;
  const bool streamed = l.outer * l.channels * l.inner * static_cast<int64_t>(sizeof(T)) >= streamed_from;
  if (streamed) {
    i_size = even_size(i_size, kRun);
    c_size = i_size == l.inner ? std::min(c_size, kRun / i_size) : 1;
    o_size = c_size * i_size == l.channels * l.inner ? std::min(o_size, kRun / (c_size * i_size)) : 1;
  }
  for (int64_t o = t.o_begin; o < t.o_end; o += o_size)
    for (int64_t c = t.c_begin; c < t.c_end; c += c_size)
      for (int64_t i = t.i_begin; i < t.i_end; i += i_size) {
        const Tile part{o, std::min(o + o_size, t.o_end), c, std::min(c + c_size, t.c_end),
                        i, std::min(i + i_size, t.i_end)};
        const int64_t first = (o * l.channels + c) * l.inner + i;
        // to[first] is run[0], and nothing before is written: so the loop is the same for both, and has but one index
        T* to = streamed ? reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(run) - first * sizeof(T)) : out;
        for_each(l, part, [=](int64_t c, int64_t index) { to[index] = value(c, index); });
        if (streamed) stream(run, part.size(), out + first);
      }
  if (streamed) finish_streams();
}

template <typename Acc>
struct Pair {
  Acc first, second;

  Pair operator+(const Pair& other) const { return {first + other.first, second + other.second}; }
};

// value(0) + value(1) + ... + value(n − 1). Not a loop: within one that is to be vectorised compilers unroll only short
// ones, and what they leave as a loop they don't vectorise.
template <int64_t n, typename Value>
inline auto sum_of(const Value& value) {
  if constexpr (n == 1)
    return value(0);
  else
    return sum_of<n - 1>(value) + value(n - 1);
}

// Sums are taken over so many rows (o) at once: what they add to is then read and written once for all of these, and
// none waits for each addition. The rows are a quarter of the tile apart, so that memory is read in long runs.
constexpr int64_t kRows = 4;

// add_up, over the `rows` rows o, o + step, o + 2·step, ... of a tile.
template <int64_t rows, typename Acc, typename Value>
inline void add_up_rows(const Layout& l, const Tile& t, int64_t o, int64_t step, Acc* first, Acc* second,
                        const Value& value) {
  const int64_t row_size = l.channels * l.inner, index = o * row_size;
  const auto sum_of_rows = [=](int64_t c, int64_t i) {
    return sum_of<rows>([=](int64_t r) { return value(c, i + r * step * row_size); });
  };
  if (l.inner == 1) {
#pragma omp simd
    for (int64_t c = t.c_begin; c < t.c_end; ++c) {
      const Pair<Acc> sum = sum_of_rows(c, index + c);
      first[c] += sum.first;
      second[c] += sum.second;
    }
  } else {
    for (int64_t c = t.c_begin; c < t.c_end; ++c) {
      Acc first_sum = 0, second_sum = 0;
#pragma omp simd reduction(+ : first_sum, second_sum)
      for (int64_t i = t.i_begin; i < t.i_end; ++i) {
        const Pair<Acc> sum = sum_of_rows(c, index + c * l.inner + i);
        first_sum += sum.first;
        second_sum += sum.second;
      }
      first[c] += first_sum;
      second[c] += second_sum;
    }
  }
}

// first[c] += Σ value(c, index).first over a tile, and so for second; c and index as in for_each. Where channels come
// last first and second are vectors, else sums of a channel are scalars.
template <typename Acc, typename Value>
inline void add_up(const Layout& l, const Tile& t, Acc* first, Acc* second, const Value& value) {
  const int64_t step = t.rows() / kRows;
  for (int64_t o = t.o_begin; o < t.o_begin + step; ++o) add_up_rows<kRows>(l, t, o, step, first, second, value);
  for (int64_t o = t.o_begin + step * kRows; o < t.o_end; ++o) add_up_rows<1>(l, t, o, 0, first, second, value);
}

constexpr int64_t kChannels = 1024;  // the most of a tile

// All tiles of a batch: each block of channels is cut into the same parts of the outer and inner dimensions.
struct Tiling {
  static constexpr int64_t kMostRows = 1024;  // of a tile: sums over more lose precision
  static constexpr int64_t kCached = 131072;  // elements of a block that stay in cache: 512 KiB of float32
  Layout layout;
  int64_t o_size, c_size, i_size, i_count;  // of a tile
  int64_t blocks, parts;

  // For two passes a tile has few channels where these stay in cache from one to the next, else long runs of memory.
  Tiling(Layout l, bool two_passes) : layout(l) {
    const int64_t outer = std::max<int64_t>(1, l.outer), inner = std::max<int64_t>(1, l.inner);
    const bool stays = two_passes && outer * inner <= kCached;
    const int64_t most = inner == 1 ? kChannels : kElementsPerTask / (stays ? outer * inner : inner);
    c_size = even_size(l.channels, std::min(std::max<int64_t>(1, most), kChannels));
    i_size = even_size(inner, kElementsPerTask / kRows);
    o_size = std::max<int64_t>(1, kElementsPerTask / (c_size * i_size * kRows)) * kRows;
    o_size = std::min({o_size, outer, kMostRows});
    i_count = ceil_div(inner, i_size);
    blocks = ceil_div(l.channels, c_size);
    parts = ceil_div(l.outer, o_size) * i_count;
  }

  Tile tile(int64_t block, int64_t part) const {
    const int64_t o = part / i_count * o_size, c = block * c_size, i = part % i_count * i_size;
    return {o, std::min(o + o_size, layout.outer), c, std::min(c + c_size, layout.channels),
            i, std::min(i + i_size, layout.inner)};
  }

  // f(tile, part) for every tile, in the order of memory.
  template <typename F>
  void for_tiles(const F& f) const {
    in_parallel([&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) f(tile(n % blocks, n / blocks), n / blocks);
    });
  }

  // Backwards: a second pass begins with what the first one left in each thread's cache.
  template <typename F>
  void for_tiles_again(const F& f) const {
    in_parallel([&](int64_t begin, int64_t end) {
      for (int64_t n = end - 1; n >= begin; --n) f(tile(n % blocks, n / blocks));
    });
  }

  // first(tile, part) for every tile, then between(c_begin, c_end) for every block of channels, then second(tile) for
  // every tile. Block by block where one stays in cache and there are enough of them for all threads: the second pass
  // then reads no memory. Neither changes what is computed.
  template <typename First, typename Between, typename Second>
  void for_tiles_twice(const First& first, const Between& between, const Second& second) const {
    const auto end_of = [&](int64_t block) { return std::min((block + 1) * c_size, layout.channels); };
    const int64_t block_size = c_size * layout.per_channel(), threads = torch::stable::get_num_threads();
    if (block_size <= kCached && (block_size * blocks <= kElementsPerTask || blocks >= 4 * threads)) {
      const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, block_size));
      parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          for (int64_t part = 0; part < parts; ++part) first(tile(block, part), part);
          between(block * c_size, end_of(block));
          for (int64_t part = parts - 1; part >= 0; --part) second(tile(block, part));
        }
      });
    } else {
      for_tiles(first);
      parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) between(block * c_size, end_of(block));
      });
      for_tiles_again(second);
    }
  }

 private:
  template <typename F>
  void in_parallel(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (o_size * c_size * i_size));
    parallel_for(0, parts * blocks, grain, f);
  }
};

}  // namespace fused_ops
