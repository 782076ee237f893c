// A batch (N, C, ...) in memory, cut into tiles that stay in cache, a range of the batch by a range of channels; and
// the loops over a tile.
#pragma once

#include <algorithm>

#include "../checks.h"
#include "vectorize.h"

namespace fused_ops {

// x[o][c][i] in memory: (N, C, positions), or (N·positions, C, 1) where channels come last.
struct Layout {
  int64_t outer, channels, inner;
};

// A range of the outer dimension, of the channels and of the inner dimension.
struct Tile {
  int64_t o_begin, o_end, c_begin, c_end, i_begin, i_end;

  int64_t size() const { return (o_end - o_begin) * (c_end - c_begin) * (i_end - i_begin); }
};

struct Tiling {
  static constexpr int64_t kElements = 16384;  // of a tile: 64 KiB of float32
  Layout layout;
  int64_t c_size, o_size, c_count, o_count;

  explicit Tiling(Layout l) : layout(l) {
    const int64_t channels = std::max<int64_t>(1, l.channels), inner = std::max<int64_t>(1, l.inner);
    c_size = std::min(channels, inner == 1 ? 512 : std::max<int64_t>(1, kElements / inner));
    o_size = std::max<int64_t>(1, kElements / (c_size * inner));
    c_count = ceil_div(channels, c_size);
    o_count = ceil_div(l.outer, o_size);
  }

  // Calls f(tile, o) for every tile, o being the tile's place along the outer dimension.
  template <typename F>
  void parallel(const F& f) const {
    const int64_t grain =
        std::max<int64_t>(1, kElementsPerTask / (c_size * o_size * std::max<int64_t>(1, layout.inner)));
    torch::stable::parallel_for(0, o_count * c_count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t o = i / c_count, c = i % c_count;
        f(Tile{o * o_size, std::min((o + 1) * o_size, layout.outer), c * c_size,
               std::min((c + 1) * c_size, layout.channels), 0, layout.inner},
          o);
      }
    });
  }
};

// f(c, index, k) for each element of a tile, the k-th of it. The inner loop runs along memory: over channels where they
// come last, else over a channel's positions.
template <typename F>
inline void for_each(const Layout& l, const Tile& t, const F& f) {
  int64_t k = 0;
  for (int64_t o = t.o_begin; o < t.o_end; ++o) {
    if (l.inner == 1) {
      const int64_t base = o * l.channels, start = k - t.c_begin;
#pragma omp simd
      for (int64_t c = t.c_begin; c < t.c_end; ++c) f(c, base + c, start + c);
      k += t.c_end - t.c_begin;
    } else {
      for (int64_t c = t.c_begin; c < t.c_end; ++c) {
        const int64_t base = (o * l.channels + c) * l.inner, start = k - t.i_begin;
#pragma omp simd
        for (int64_t i = t.i_begin; i < t.i_end; ++i) f(c, base + i, start + i);
        k += t.i_end - t.i_begin;
      }
    }
  }
}

template <typename Acc>
struct Pair {
  Acc first, second;
};

// first[c] += Σ value(c, index, k).first over a tile, and so for second. In the order of for_each: where channels come
// last first and second are vectors, else sums of a channel are scalars.
template <typename Acc, typename Value>
inline void add_up(const Layout& l, const Tile& t, Acc* first, Acc* second, const Value& value) {
  int64_t k = 0;
  for (int64_t o = t.o_begin; o < t.o_end; ++o) {
    if (l.inner == 1) {
      const int64_t base = o * l.channels, start = k - t.c_begin;
#pragma omp simd
      for (int64_t c = t.c_begin; c < t.c_end; ++c) {
        const Pair<Acc> values = value(c, base + c, start + c);
        first[c] += values.first;
        second[c] += values.second;
      }
      k += t.c_end - t.c_begin;
    } else {
      for (int64_t c = t.c_begin; c < t.c_end; ++c) {
        const int64_t base = (o * l.channels + c) * l.inner, start = k - t.i_begin;
        Acc first_sum = 0, second_sum = 0;
#pragma omp simd reduction(+ : first_sum, second_sum)
        for (int64_t i = t.i_begin; i < t.i_end; ++i) {
          const Pair<Acc> values = value(c, base + i, start + i);
          first_sum += values.first;
          second_sum += values.second;
        }
        first[c] += first_sum;
        second[c] += second_sum;
        k += t.i_end - t.i_begin;
      }
    }
  }
}

// A strip is a part of a tile of so few elements that they stay in the innermost cache.
constexpr int64_t kStrip = 2048;

// f(strip) for each strip of a tile.
template <typename F>
inline void for_strips(const Layout& l, const Tile& t, const F& f) {
  const int64_t c_size = l.inner == 1 ? t.c_end - t.c_begin : std::max<int64_t>(1, kStrip / l.inner);
  const int64_t o_size = l.inner == 1 ? std::max<int64_t>(1, kStrip / c_size) : 1;
  for (int64_t o = t.o_begin; o < t.o_end; o += o_size)
    for (int64_t c = t.c_begin; c < t.c_end; c += c_size)
      for (int64_t i = t.i_begin; i < t.i_end; i += kStrip)
        f(Tile{o, std::min(o + o_size, t.o_end), c, std::min(c + c_size, t.c_end), i, std::min(i + kStrip, t.i_end)});
}

// Whether memory holds (N, positions..., C) without gaps, for the shapes that PyTorch has a channels_last format for.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() < 4 || x.dim() > 5) return false;
  int64_t expected = 1;
  const auto has_stride = [&](int64_t d) {
    const bool ok = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return ok;
  };
  bool ok = has_stride(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) ok = has_stride(d) && ok;
  return has_stride(0) && ok;
}

// Whether the strides of x have the order of channels_last, with gaps or without: then PyTorch's outputs have it, too.
inline bool is_like_channels_last(const Tensor& x) {
  if (x.dim() < 4 || x.dim() > 5 || x.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t d = i == 0 ? 1 : (i == x.dim() - 1 ? 0 : x.dim() - i);  // the channels, the positions, the batch
    if (x.size(d) == 0 || x.stride(d) < least || (d == 0 && least == x.stride(1))) return false;
    least = x.stride(d) * std::max<int64_t>(1, x.size(d));
  }
  return true;
}

// x itself where it is dense, else a dense copy.
inline Tensor dense(const Tensor& x, bool channels_last) {
  if (!channels_last) return torch::stable::contiguous(x);
  if (is_channels_last(x)) return x;
  Tensor copied = torch::stable::empty_like(x);  // which keeps the order of the strides
  return torch::stable::copy_(copied, x);
}

inline Layout layout_of(const Tensor& x, bool channels_last) {
  const int64_t N = x.size(0), C = x.size(1), per_channel = C ? x.numel() / C : 0;
  if (per_channel == 0) return {0, C, 0};
  if (channels_last) return {per_channel, C, 1};
  return {N, C, per_channel / N};
}

// t, which has the shape and dtype of input, in its layout.
inline Tensor in_layout_of(const Tensor& input, bool channels_last, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == input.dim() && t.scalar_type() == input.scalar_type(), name,
                  " should have the shape and dtype of the input");
  for (int64_t d = 0; d < input.dim(); ++d)
    STD_TORCH_CHECK(t.size(d) == input.size(d), name, " should have the shape of the input");
  if (channels_last ? is_channels_last(t) : t.is_contiguous()) return t;
  Tensor like_input = torch::stable::empty_like(input);
  return torch::stable::copy_(like_input, t);
}

}  // namespace fused_ops
