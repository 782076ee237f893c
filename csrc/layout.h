// How a batch (N, C, ...) lies in memory, and tensors that lie alike.
#pragma once

#include <algorithm>

#include "checks.h"

namespace fused_ops {

// x[o][c][i] in memory: (N, C, positions), or (N·positions, C, 1) where channels come last, as in (N, C), too.
struct Layout {
  int64_t outer, channels, inner;

  int64_t per_channel() const { return outer * inner; }
};

inline Layout layout_of(const Tensor& x, bool channels_last) {
  const int64_t N = x.size(0), C = x.size(1), per_channel = C ? x.numel() / C : 0;
  if (per_channel == 0) return {0, C, 0};
  if (channels_last) return {per_channel, C, 1};
  return {N, C, per_channel / N};
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
  if (!channels_last) return as_contiguous(x);
  if (is_channels_last(x)) return x;
  Tensor copied = torch::stable::empty_like(x);  // which keeps the order of the strides
  return torch::stable::copy_(copied, x);
}

// stats = (μ, r) of C channels, without gaps: stats itself where it is so.
inline Tensor dense_stats(const Tensor& stats, int64_t C, ScalarType type) {
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == C && stats.scalar_type() == type,
                  "stats should be (2, C), of the right dtype");
  return as_contiguous(stats);
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
