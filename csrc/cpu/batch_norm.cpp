// Batch normalisation. Derivation and names: fused_ops/ops/batch_norm.py.
//
// A tensor is cut into tiles that stay in cache (tiles.h). Statistics are taken tile by tile in two passes (mean, then
// squared distances), so memory is read once, and merged in the order of the tiles: the result does not depend on the
// number of threads.
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "../activations.h"
#include "../checks.h"
#include "huge_pages.h"
#include "tiles.h"

namespace fused_ops {
namespace {

// Each channel's mean and sum of squared distances from it. The distances from the exact mean add up to zero; what
// those from the rounded one add up to corrects both (Chan, Golub and LeVeque 1983). `distances` is scratch.
template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_moments(const Layout& l, const Tile& t, const T* x, Acc* mean, Acc* m2, Acc* distances) {
  const Acc count = static_cast<Acc>((t.o_end - t.o_begin) * l.inner);
  add_up(l, t, mean, distances, [=](int64_t, int64_t i, int64_t) { return Pair<Acc>{widen(x[i]), 0}; });
  for (int64_t c = t.c_begin; c < t.c_end; ++c) mean[c] /= count;
  add_up(l, t, distances, m2, [=](int64_t c, int64_t i, int64_t) {
    const Acc distance = widen(x[i]) - mean[c];
    return Pair<Acc>{distance, distance * distance};
  });
  for (int64_t c = t.c_begin; c < t.c_end; ++c) {
    mean[c] += distances[c] / count;
    const Acc corrected = m2[c] - distances[c] * distances[c] / count;
    m2[c] = corrected < 0 ? 0 : corrected;
  }
}

// An activation and its derivative, each in place of n values of z. Both null: no activation.
template <typename Acc>
struct Activation {
  void (*value)(Acc* z, int64_t n) = nullptr;
  void (*derivative)(Acc* z, int64_t n) = nullptr;
};

template <typename A, typename Acc>
FUSED_OPS_VECTORIZED void apply_value(Acc* z, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) z[k] = A::value(z[k]);
}

template <typename A, typename Acc>
FUSED_OPS_VECTORIZED void apply_derivative(Acc* z, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) z[k] = A::derivative(z[k]);
}

template <typename Acc>
Activation<Acc> activation_of(const std::optional<std::string>& name) {
  Activation<Acc> activation;
  if (name) {
    const bool known = dispatch_activation(*name, [&](auto a) {
      using A = decltype(a);
      activation = {apply_value<A, Acc>, apply_derivative<A, Acc>};
    });
    STD_TORCH_CHECK(known, "batch_norm: there is no activation ", *name);
  }
  return activation;
}

// What y = a(z) is made of, z = (x − μ)·γr + β + residual.
template <typename T, typename Acc = accumulate_t<T>>
struct Forward {
  const T* x;
  const T* residual;  // or null
  const Acc *mean, *rstd, *scale, *bias;
  Activation<Acc> activation;
};

// z of a strip, into z[0], z[1], ...
template <typename T, typename Acc = accumulate_t<T>>
inline void strip_z(const Layout& l, const Tile& s, const Forward<T>& f, Acc* z) {
  for_each(l, s, [x = f.x, mean = f.mean, scale = f.scale, bias = f.bias, z](int64_t c, int64_t i, int64_t k) {
    z[k] = (widen(x[i]) - mean[c]) * scale[c] + bias[c];
  });
  if (f.residual)
    for_each(l, s, [residual = f.residual, z](int64_t, int64_t i, int64_t k) { z[k] += widen(residual[i]); });
}

template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_forward(const Layout& l, const Tile& t, const Forward<T>& f, T* y) {
  if (f.activation.value || f.residual) {
    alignas(64) Acc z[kStrip];
    for_strips(l, t, [&](const Tile& s) {
      strip_z(l, s, f, z);
      if (f.activation.value) f.activation.value(z, s.size());
      for_each(l, s, [z = &z[0], y](int64_t, int64_t i, int64_t k) { y[i] = narrow<T>(z[k]); });
    });
  } else {
    for_each(l, t, [x = f.x, mean = f.mean, scale = f.scale, bias = f.bias, y](int64_t c, int64_t i, int64_t) {
      y[i] = narrow<T>((widen(x[i]) - mean[c]) * scale[c] + bias[c]);
    });
  }
}

// use(s, dz) for parts s of a tile, where dz(i, k) is dy·a'(z) of the k-th element, at index i: strips with an
// activation, else the whole tile at once, where dz is dy.
template <typename T, typename Use, typename Acc = accumulate_t<T>>
inline void with_dz(const Layout& l, const Tile& t, const Forward<T>& f, const T* dy, const Use& use) {
  if (f.activation.derivative) {
    alignas(64) Acc dz[kStrip];
    for_strips(l, t, [&](const Tile& s) {
      strip_z(l, s, f, dz);
      f.activation.derivative(dz, s.size());
      for_each(l, s, [dz = &dz[0], dy](int64_t, int64_t i, int64_t k) { dz[k] *= widen(dy[i]); });
      use(s, [dz = &dz[0]](int64_t, int64_t k) { return dz[k]; });
    });
  } else {
    use(t, [dy](int64_t i, int64_t) { return widen(dy[i]); });
  }
}

// Σ dz and Σ dz·x̂; and dz itself, unless `kept` is null
template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_sums(const Layout& l, const Tile& t, const Forward<T>& f, const T* dy, Acc* dz_sum,
                                    Acc* dz_x_hat_sum, T* kept) {
  with_dz(l, t, f, dy, [&, x = f.x, mean = f.mean, rstd = f.rstd](const Tile& s, const auto& dz) {
    if (kept) for_each(l, s, [=](int64_t, int64_t i, int64_t k) { kept[i] = narrow<T>(dz(i, k)); });
    add_up(l, s, dz_sum, dz_x_hat_sum, [=](int64_t c, int64_t i, int64_t k) {
      const Acc dz_k = dz(i, k);
      return Pair<Acc>{dz_k, dz_k * ((widen(x[i]) - mean[c]) * rstd[c])};
    });
  });
}

// The means of dz and of dz·x̂ over a channel; null in evaluation, where dx does not depend on them.
template <typename Acc>
struct Means {
  const Acc *dz, *dz_x_hat;
};

// dx = γr·(dz − mean(dz) − x̂·mean(dz·x̂)), in evaluation dx = γr·dz; and dresidual = dz. Null: not needed.
template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_backward(const Layout& l, const Tile& t, const Forward<T>& f, const T* dy,
                                        const Means<Acc>& means, T* dx, T* dresidual) {
  with_dz(l, t, f, dy, [&, x = f.x, mean = f.mean, rstd = f.rstd, scale = f.scale](const Tile& s, const auto& dz) {
    if (dresidual) for_each(l, s, [=](int64_t, int64_t i, int64_t k) { dresidual[i] = narrow<T>(dz(i, k)); });
    if (dx && means.dz) {
      for_each(l, s, [=, dz_mean = means.dz, dz_x_hat_mean = means.dz_x_hat](int64_t c, int64_t i, int64_t k) {
        const Acc x_hat = (widen(x[i]) - mean[c]) * rstd[c];
        dx[i] = narrow<T>(scale[c] * (dz(i, k) - dz_mean[c] - x_hat * dz_x_hat_mean[c]));
      });
    } else if (dx) {
      for_each(l, s, [=](int64_t c, int64_t i, int64_t k) { dx[i] = narrow<T>(scale[c] * dz(i, k)); });
    }
  });
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
  std::vector<Acc> means(tiling.o_count * C), m2s(tiling.o_count * C), distances(tiling.o_count * C), var(C);
  tiling.parallel([&](const Tile& t, int64_t o) {
    tile_moments<T>(l, t, x, means.data() + o * C, m2s.data() + o * C, distances.data() + o * C);
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
                                                      double eps, std::optional<std::string> activation,
                                                      std::optional<Tensor> residual) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should be (N, C, ...)");
  STD_TORCH_CHECK(training || (running_mean && running_var), "running statistics must be defined in evaluation mode");
  const bool channels_last = !input.is_contiguous() && is_like_channels_last(input);
  input = dense(input, channels_last);
  if (residual) residual = in_layout_of(input, channels_last, *residual, "residual");
  const Tiling tiling(layout_of(input, channels_last));
  const int64_t C = tiling.layout.channels, N = tiling.layout.outer * tiling.layout.inner;
  const auto acc_type = accumulate_type(input.scalar_type());
  Tensor y = on_huge_pages(torch::stable::empty_like(input));
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
    const Forward<T> forward{x,           data_or_null<T>(residual),     mean, rstd, scale.data(),
                             beta.data(), activation_of<Acc>(activation)};
    T* out = y.mutable_data_ptr<T>();
    tiling.parallel([&](const Tile& t, int64_t) { tile_forward<T>(tiling.layout, t, forward, out); });
  });
  return {y, mean_out, rstd_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(Tensor dy, Tensor input, std::optional<Tensor> weight,
                                                               std::optional<Tensor> bias,
                                                               std::optional<Tensor> residual, Tensor mean_in,
                                                               Tensor rstd_in, bool training, double,
                                                               std::optional<std::string> activation, bool needs_input,
                                                               bool needs_parameters, bool needs_residual) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should be (N, C, ...)");
  const bool channels_last = !input.is_contiguous() && is_like_channels_last(input);
  input = dense(input, channels_last);
  dy = in_layout_of(input, channels_last, dy, "dy");
  if (residual) residual = in_layout_of(input, channels_last, *residual, "residual");
  const Tiling tiling(layout_of(input, channels_last));
  const Layout& l = tiling.layout;
  const int64_t C = l.channels;
  const auto acc_type = accumulate_type(input.scalar_type());
  const Tensor mean_c = torch::stable::contiguous(mean_in), rstd_c = torch::stable::contiguous(rstd_in);
  check_vector(mean_c, C, acc_type, "mean");
  check_vector(rstd_c, C, acc_type, "rstd");

  // what is not needed comes back empty
  const bool through_statistics = needs_input && training;
  const auto like_input = [&](bool needed) {
    return needed ? on_huge_pages(torch::stable::empty_like(input)) : torch::stable::new_empty(input, {0});
  };
  needs_residual = needs_residual && activation;  // without an activation it is dy
  Tensor dx_out = like_input(needs_input), dresidual_out = like_input(needs_residual);
  Tensor dweight_out = torch::stable::new_empty(input, {needs_parameters ? C : 0}, acc_type);
  Tensor dbias_out = torch::stable::new_empty(input, {needs_parameters ? C : 0}, acc_type);

  dispatch_floating(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const T* g = dy.const_data_ptr<T>();
    const Acc* rstd = rstd_c.const_data_ptr<Acc>();
    const std::vector<Acc> beta = channel_values<Acc>(bias, C, 0, "bias");
    std::vector<Acc> scale = channel_values<Acc>(weight, C, 1, "weight"), dz_mean(C), dz_x_hat_mean(C);
    for (int64_t c = 0; c < C; ++c) scale[c] *= rstd[c];  // γ·r
    T* dx = needs_input ? dx_out.mutable_data_ptr<T>() : nullptr;
    T* dresidual = needs_residual ? dresidual_out.mutable_data_ptr<T>() : nullptr;
    Forward<T> forward{input.const_data_ptr<T>(),
                       data_or_null<T>(residual),
                       mean_c.const_data_ptr<Acc>(),
                       rstd,
                       scale.data(),
                       beta.data(),
                       activation_of<Acc>(activation)};

    if (needs_parameters || through_statistics) {
      std::vector<Acc> dz_sums(tiling.o_count * C), dz_x_hat_sums(tiling.o_count * C);
      // The second pass need not work dz out again, where T holds it without rounding.
      T* kept = activation && std::is_same_v<T, Acc> ? (dresidual ? dresidual : dx) : nullptr;
      tiling.parallel([&](const Tile& t, int64_t o) {
        tile_sums<T>(l, t, forward, g, dz_sums.data() + o * C, dz_x_hat_sums.data() + o * C, kept);
      });
      if (kept) {
        g = kept;
        forward.activation = {};
        dresidual = nullptr;
      }
      std::vector<double> dz_sum(C), dz_x_hat_sum(C);  // over all tiles
      for (int64_t o = 0; o < tiling.o_count; ++o)
        for (int64_t c = 0; c < C; ++c) {
          dz_sum[c] += dz_sums[o * C + c];
          dz_x_hat_sum[c] += dz_x_hat_sums[o * C + c];
        }
      const double N = static_cast<double>(l.outer * l.inner);
      for (int64_t c = 0; c < C; ++c) {
        dz_mean[c] = static_cast<Acc>(dz_sum[c] / N);
        dz_x_hat_mean[c] = static_cast<Acc>(dz_x_hat_sum[c] / N);
      }
      if (needs_parameters) {
        std::copy(dz_sum.begin(), dz_sum.end(), dbias_out.mutable_data_ptr<Acc>());
        std::copy(dz_x_hat_sum.begin(), dz_x_hat_sum.end(), dweight_out.mutable_data_ptr<Acc>());
      }
    }
    const Means<Acc> means{training ? dz_mean.data() : nullptr, dz_x_hat_mean.data()};
    if (dx || dresidual)
      tiling.parallel([&](const Tile& t, int64_t) { tile_backward<T>(l, t, forward, g, means, dx, dresidual); });
  });
  return {dx_out, dweight_out, dbias_out, dresidual_out};
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&fused_ops::batch_norm_forward));
  m.impl("batch_norm_backward", TORCH_BOX(&fused_ops::batch_norm_backward));
}
