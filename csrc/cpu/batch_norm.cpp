// Batch normalisation. Derivation and names: fused_ops/ops/batch_norm.py.
//
// A tensor is cut into tiles that stay in cache, a range of the batch by a range of channels. Statistics are taken tile
// by tile in two passes (mean, then squared distances), so memory is read once, and merged in the order of the tiles:
// the result does not depend on the number of threads.
#include <algorithm>
#include <limits>
#include <vector>

#include "../checks.h"
#include "vectorize.h"

namespace fused_ops {
namespace {

// x[o][c][i] in memory: (N, C, positions), or (N·positions, C, 1) where channels come last.
struct Layout {
  int64_t outer, channels, inner;
};

// A range of the outer dimension by a range of channels.
struct Tile {
  int64_t o_begin, o_end, c_begin, c_end;
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
               std::min((c + 1) * c_size, layout.channels)},
          o);
      }
    });
  }
};

// sums[c] += Σ value(c, index) over a tile. The inner loop runs along memory: over channels where they come last (then
// sums is a vector), else over a channel's positions (then its sum is a scalar).
template <typename Acc, typename Value>
inline void add_up(const Layout& l, const Tile& t, Acc* sums, const Value& value) {
  for (int64_t o = t.o_begin; o < t.o_end; ++o) {
    if (l.inner == 1) {
      const int64_t base = o * l.channels;
#pragma omp simd
      for (int64_t c = t.c_begin; c < t.c_end; ++c) sums[c] += value(c, base + c);
    } else {
      for (int64_t c = t.c_begin; c < t.c_end; ++c) {
        const int64_t base = (o * l.channels + c) * l.inner;
        Acc sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < l.inner; ++i) sum += value(c, base + i);
        sums[c] += sum;
      }
    }
  }
}

// out[index] = value(c, index) over a tile.
template <typename T, typename Value>
inline void write(const Layout& l, const Tile& t, T* out, const Value& value) {
  for (int64_t o = t.o_begin; o < t.o_end; ++o) {
    if (l.inner == 1) {
      const int64_t base = o * l.channels;
#pragma omp simd
      for (int64_t c = t.c_begin; c < t.c_end; ++c) out[base + c] = narrow<T>(value(c, base + c));
    } else {
      for (int64_t c = t.c_begin; c < t.c_end; ++c) {
        const int64_t base = (o * l.channels + c) * l.inner;
#pragma omp simd
        for (int64_t i = 0; i < l.inner; ++i) out[base + i] = narrow<T>(value(c, base + i));
      }
    }
  }
}

// Each channel's mean and sum of squared distances from it. The distances from the exact mean add up to zero; what
// those from the rounded one add up to corrects both (Chan, Golub and LeVeque 1983). `residual` is scratch.
template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_moments(const Layout& l, const Tile& t, const T* x, Acc* mean, Acc* m2, Acc* residual) {
  const Acc count = static_cast<Acc>((t.o_end - t.o_begin) * l.inner);
  add_up(l, t, mean, [=](int64_t, int64_t i) { return widen(x[i]); });
  for (int64_t c = t.c_begin; c < t.c_end; ++c) mean[c] /= count;
  add_up(l, t, residual, [=](int64_t c, int64_t i) { return widen(x[i]) - mean[c]; });
  add_up(l, t, m2, [=](int64_t c, int64_t i) {
    const Acc distance = widen(x[i]) - mean[c];
    return distance * distance;
  });
  for (int64_t c = t.c_begin; c < t.c_end; ++c) {
    mean[c] += residual[c] / count;
    const Acc corrected = m2[c] - residual[c] * residual[c] / count;
    m2[c] = corrected < 0 ? 0 : corrected;
  }
}

// y = (x − μ)·γr + β
template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_forward(const Layout& l, const Tile& t, const T* x, const Acc* mean, const Acc* scale,
                                       const Acc* bias, T* y) {
  write(l, t, y, [=](int64_t c, int64_t i) { return (widen(x[i]) - mean[c]) * scale[c] + bias[c]; });
}

// Σ dy and Σ dy·x̂
template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_sums(const Layout& l, const Tile& t, const T* dy, const T* x, const Acc* mean,
                                    const Acc* rstd, Acc* dy_sum, Acc* dy_x_hat_sum) {
  add_up(l, t, dy_sum, [=](int64_t, int64_t i) { return widen(dy[i]); });
  add_up(l, t, dy_x_hat_sum, [=](int64_t c, int64_t i) { return widen(dy[i]) * ((widen(x[i]) - mean[c]) * rstd[c]); });
}

// dx = γr·(dy − mean(dy) − x̂·mean(dy·x̂)), in evaluation dx = γr·dy
template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_backward(const Layout& l, const Tile& t, const T* dy, const T* x, const Acc* mean,
                                        const Acc* rstd, const Acc* scale, const Acc* dy_mean, const Acc* dy_x_hat_mean,
                                        bool training, T* dx) {
  if (training) {
    write(l, t, dx, [=](int64_t c, int64_t i) {
      const Acc x_hat = (widen(x[i]) - mean[c]) * rstd[c];
      return scale[c] * (widen(dy[i]) - dy_mean[c] - x_hat * dy_x_hat_mean[c]);
    });
  } else {
    write(l, t, dx, [=](int64_t c, int64_t i) { return scale[c] * widen(dy[i]); });
  }
}

// Whether memory holds (N, positions..., C) without gaps, for the shapes that PyTorch has a channels_last format for.
bool is_channels_last(const Tensor& x) {
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

Layout layout_of(const Tensor& x, bool channels_last) {
  const int64_t N = x.size(0), C = x.size(1), per_channel = C ? x.numel() / C : 0;
  if (per_channel == 0) return {0, C, 0};
  if (channels_last) return {per_channel, C, 1};
  return {N, C, per_channel / N};
}

// A (C,) tensor's values in the accumulate type; `missing` where there is none.
template <typename Acc>
std::vector<Acc> channel_values(const std::optional<Tensor>& v, int64_t C, Acc missing, const char* name) {
  if (!v) return std::vector<Acc>(C, missing);
  const auto type = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor t = torch::stable::contiguous(torch::stable::to(*v, type));
  check_vector(t, C, type, name);
  return std::vector<Acc>(t.const_data_ptr<Acc>(), t.const_data_ptr<Acc>() + C);
}

// running ← (1 − momentum)·running + momentum·batch, through copy_, which takes any dtype and tells autograd.
template <typename Acc>
void move_running(Tensor running, const std::vector<Acc>& batch, double momentum, const char* name) {
  const int64_t C = static_cast<int64_t>(batch.size());
  const std::vector<Acc> before = channel_values<Acc>(running, C, 0, name);
  const auto type = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor moved = torch::stable::new_empty(running, {C}, type);
  Acc* out = moved.mutable_data_ptr<Acc>();
  for (int64_t c = 0; c < C; ++c)
    out[c] = static_cast<Acc>(1 - momentum) * before[c] + static_cast<Acc>(momentum) * batch[c];
  torch::stable::copy_(running, moved);
}

// The mean of each channel, into `mean`, and its biased variance.
template <typename T, typename Acc = accumulate_t<T>>
std::vector<Acc> batch_statistics(const Tiling& tiling, const T* x, Acc* mean) {
  const Layout& l = tiling.layout;
  const int64_t C = l.channels;
  std::vector<Acc> means(tiling.o_count * C), m2s(tiling.o_count * C), residuals(tiling.o_count * C), var(C);
  tiling.parallel([&](const Tile& t, int64_t o) {
    tile_moments<T>(l, t, x, means.data() + o * C, m2s.data() + o * C, residuals.data() + o * C);
  });
  for (int64_t c = 0; c < C; ++c) {
    Moments<double> total;
    for (int64_t o = 0; o < tiling.o_count; ++o) {
      const int64_t rows = std::min((o + 1) * tiling.o_size, l.outer) - o * tiling.o_size;
      total.merge(static_cast<double>(rows * l.inner), means[o * C + c], m2s[o * C + c]);
    }
    const bool empty = total.count == 0;
    mean[c] = empty ? std::numeric_limits<Acc>::quiet_NaN() : static_cast<Acc>(total.mean);
    var[c] = static_cast<Acc>(total.m2 / total.count);  // NaN where empty
  }
  return var;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(Tensor input, std::optional<Tensor> running_mean,
                                                      std::optional<Tensor> running_var, std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias, bool training, double momentum,
                                                      double eps) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should be (N, C, ...)");
  STD_TORCH_CHECK(training || (running_mean && running_var), "running statistics must be defined in evaluation mode");
  const bool channels_last = !input.is_contiguous() && is_channels_last(input);
  input = channels_last ? input : torch::stable::contiguous(input);
  const Tiling tiling(layout_of(input, channels_last));
  const int64_t C = tiling.layout.channels, N = tiling.layout.outer * tiling.layout.inner;
  const auto acc_type = accumulate_type(input.scalar_type());
  Tensor y = torch::stable::empty_like(input);
  Tensor mean_out = torch::stable::new_empty(input, {C}, acc_type);
  Tensor rstd_out = torch::stable::new_empty(input, {C}, acc_type);

  dispatch_floating(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const T* x = input.const_data_ptr<T>();
    Acc* mean = mean_out.mutable_data_ptr<Acc>();
    Acc* rstd = rstd_out.mutable_data_ptr<Acc>();
    const std::vector<Acc> beta = channel_values<Acc>(bias, C, 0, "bias");
    std::vector<Acc> scale = channel_values<Acc>(weight, C, 1, "weight"), var;

    if (training) {
      var = batch_statistics<T>(tiling, x, mean);
      if (N > 0 && running_mean)
        move_running(*running_mean, std::vector<Acc>(mean, mean + C), momentum, "running_mean");
      if (N > 0 && running_var) {
        std::vector<Acc> unbiased_var(C);
        for (int64_t c = 0; c < C; ++c) unbiased_var[c] = var[c] * (static_cast<Acc>(N) / static_cast<Acc>(N - 1));
        move_running(*running_var, unbiased_var, momentum, "running_var");
      }
    } else {
      const std::vector<Acc> running = channel_values<Acc>(running_mean, C, 0, "running_mean");
      std::copy(running.begin(), running.end(), mean);
      var = channel_values<Acc>(running_var, C, 0, "running_var");
    }
    for (int64_t c = 0; c < C; ++c) {
      rstd[c] = 1 / std::sqrt(var[c] + static_cast<Acc>(eps));
      scale[c] *= rstd[c];  // γ·r
    }
    T* out = y.mutable_data_ptr<T>();
    tiling.parallel(
        [&](const Tile& t, int64_t) { tile_forward<T>(tiling.layout, t, x, mean, scale.data(), beta.data(), out); });
  });
  return {y, mean_out, rstd_out};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor dy, Tensor input, std::optional<Tensor> weight,
                                                       Tensor mean_in, Tensor rstd_in, bool training, double) {
  STD_TORCH_CHECK(input.dim() >= 2 && dy.dim() == input.dim() && dy.scalar_type() == input.scalar_type(),
                  "dy and input should have one shape, (N, C, ...), and one dtype");
  for (int64_t d = 0; d < input.dim(); ++d)
    STD_TORCH_CHECK(dy.size(d) == input.size(d), "dy and input should have one shape");
  const bool channels_last = !input.is_contiguous() && is_channels_last(input);
  input = channels_last ? input : torch::stable::contiguous(input);
  if (channels_last ? !is_channels_last(dy) : !dy.is_contiguous()) {
    Tensor like_input = torch::stable::empty_like(input);
    dy = torch::stable::copy_(like_input, dy);
  }
  const Tiling tiling(layout_of(input, channels_last));
  const Layout& l = tiling.layout;
  const int64_t C = l.channels;
  const auto acc_type = accumulate_type(input.scalar_type());
  const Tensor mean_c = torch::stable::contiguous(mean_in), rstd_c = torch::stable::contiguous(rstd_in);
  check_vector(mean_c, C, acc_type, "mean");
  check_vector(rstd_c, C, acc_type, "rstd");
  Tensor dx_out = torch::stable::empty_like(input);
  Tensor dweight_out = torch::stable::new_empty(input, {C}, acc_type);
  Tensor dbias_out = torch::stable::new_empty(input, {C}, acc_type);

  dispatch_floating(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const T* x = input.const_data_ptr<T>();
    const T* g = dy.const_data_ptr<T>();
    const Acc* mean = mean_c.const_data_ptr<Acc>();
    const Acc* rstd = rstd_c.const_data_ptr<Acc>();
    Acc* dweight = dweight_out.mutable_data_ptr<Acc>();
    Acc* dbias = dbias_out.mutable_data_ptr<Acc>();

    std::vector<Acc> dy_sums(tiling.o_count * C), dy_x_hat_sums(tiling.o_count * C);
    tiling.parallel([&](const Tile& t, int64_t o) {
      tile_sums<T>(l, t, g, x, mean, rstd, dy_sums.data() + o * C, dy_x_hat_sums.data() + o * C);
    });
    std::vector<double> dy_sum(C), dy_x_hat_sum(C);  // over all tiles
    for (int64_t o = 0; o < tiling.o_count; ++o)
      for (int64_t c = 0; c < C; ++c) {
        dy_sum[c] += dy_sums[o * C + c];
        dy_x_hat_sum[c] += dy_x_hat_sums[o * C + c];
      }

    const double N = static_cast<double>(l.outer * l.inner);
    std::vector<Acc> scale = channel_values<Acc>(weight, C, 1, "weight"), dy_mean(C), dy_x_hat_mean(C);
    for (int64_t c = 0; c < C; ++c) {
      scale[c] *= rstd[c];  // γ·r
      dbias[c] = static_cast<Acc>(dy_sum[c]);
      dweight[c] = static_cast<Acc>(dy_x_hat_sum[c]);
      dy_mean[c] = static_cast<Acc>(dy_sum[c] / N);
      dy_x_hat_mean[c] = static_cast<Acc>(dy_x_hat_sum[c] / N);
    }
    T* dx = dx_out.mutable_data_ptr<T>();
    tiling.parallel([&](const Tile& t, int64_t) {
      tile_backward<T>(l, t, g, x, mean, rstd, scale.data(), dy_mean.data(), dy_x_hat_mean.data(), training, dx);
    });
  });
  return {dx_out, dweight_out, dbias_out};
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&fused_ops::batch_norm_forward));
  m.impl("batch_norm_backward", TORCH_BOX(&fused_ops::batch_norm_backward));
}
