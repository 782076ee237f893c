// Batch normalisation. Derivation and names: fused_ops/ops/batch_norm.py.
//
// A tensor is cut into tiles (tiles.h), whose moments and sums are merged in the order of the tiles: the result does
// not depend on the number of threads. Where a few channels stay in cache, a thread finishes them, statistics and all,
// before the next, and reads memory once a pass.
#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../checks.h"
#include "../empty.h"
#include "batch_norm_passes.h"
#include "huge_pages.h"

namespace fused_ops {

// Compiled apart, to compile side by side: in batch_norm_float.cpp, batch_norm_double.cpp, ...
extern template Passes<float> passes_with(const std::optional<Name>&);
extern template Passes<double> passes_with(const std::optional<Name>&);
extern template Passes<c10::Half> passes_with(const std::optional<Name>&);
extern template Passes<c10::BFloat16> passes_with(const std::optional<Name>&);

namespace {

// Merges the moments of a channel's values in the rows o, o + step, o + 2·step, ... with those of `before` values, as
// by Chan, Golub and LeVeque (1979). The values are taken in two passes, of which the second mends what the first one's
// mean has lost to rounding: so the moments are exact whatever the values, and memory is read once.
template <int64_t rows, typename T, typename Acc = accumulate_t<T>>
inline void merge_rows(const Layout& l, const Tile& t, int64_t o, int64_t step, Acc before, const T* x, Acc* mean,
                       Acc* m2) {
  const int64_t row_size = l.channels * l.inner, index = o * row_size;
  const auto value = [=](int64_t r, int64_t i) { return widen(x[index + r * step * row_size + i]); };
  const auto sum = [=](int64_t i) { return sum_of<rows>([=](int64_t r) { return value(r, i); }); };
  const auto distances = [=](int64_t i, Acc centre) {  // and their squares
    return sum_of<rows>([=](int64_t r) {
      const Acc distance = value(r, i) - centre;
      return Pair<Acc>{distance, distance * distance};
    });
  };
  const auto merge = [=](int64_t c, Acc count, Acc centre, Acc distance, Acc squares) {
    const Acc share = count / (before + count), delta = centre - mean[c] + distance / count;
    mean[c] += delta * share;
    m2[c] += squares - distance * (distance / count) + delta * delta * (before * share);
  };
  if (l.inner == 1) {
#pragma omp simd
    for (int64_t c = t.c_begin; c < t.c_end; ++c) {
      const Acc centre = sum(c) / rows;
      const Pair<Acc> of_rows = distances(c, centre);
      merge(c, rows, centre, of_rows.first, of_rows.second);
    }
  } else {
    const Acc count = static_cast<Acc>(rows * (t.i_end - t.i_begin));
    for (int64_t c = t.c_begin; c < t.c_end; ++c) {
      const int64_t begin = c * l.inner + t.i_begin, end = c * l.inner + t.i_end;
      Acc total = 0, distance = 0, squares = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = begin; i < end; ++i) total += sum(i);
      const Acc centre = total / count;
#pragma omp simd reduction(+ : distance, squares)
      for (int64_t i = begin; i < end; ++i) {
        const Pair<Acc> of_rows = distances(i, centre);
        distance += of_rows.first;
        squares += of_rows.second;
      }
      merge(c, count, centre, distance, squares);
    }
  }
}

// Of the values of each channel in a tile: the mean and the sum of the squared distances from it.
template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_moments(const Layout& l, const Tile& t, const T* x, Acc* mean, Acc* m2) {
  for (Acc* v : {mean, m2}) std::fill(v + t.c_begin, v + t.c_end, Acc(0));
  const int64_t step = t.rows() / kRows, run = t.i_end - t.i_begin;
  for (int64_t k = 0; k < step; ++k)
    merge_rows<kRows>(l, t, t.o_begin + k, step, static_cast<Acc>(k * kRows * run), x, mean, m2);
  for (int64_t k = step * kRows; k < t.rows(); ++k)
    merge_rows<1>(l, t, t.o_begin + k, 0, static_cast<Acc>(k * run), x, mean, m2);
}

// Uninitialised scratch: values of each channel for each part of a tiling.
template <typename Acc>
class PerPart {
 public:
  explicit PerPart(const Tiling& tiling)
      : channels_(tiling.layout.channels), values_(new Acc[tiling.parts * tiling.layout.channels]) {}
  Acc* operator[](int64_t part) const { return values_.get() + part * channels_; }

 private:
  int64_t channels_;
  std::unique_ptr<Acc[]> values_;
};

// The mean and the biased variance of each channel of a block from the moments of its tiles, merged in the same way.
// NaN of an empty batch.
template <typename Acc>
FUSED_OPS_VECTORIZED void merge_moments(const Tiling& tiling, int64_t c_begin, int64_t c_end,
                                        const PerPart<Acc>& mean_of, const PerPart<Acc>& m2_of, Acc* mean, Acc* var) {
  double means[kChannels] = {}, m2s[kChannels] = {}, total = 0;
  for (int64_t part = 0; part < tiling.parts; ++part) {
    const Tile t = tiling.tile(0, part);
    const double count = static_cast<double>(t.rows() * (t.i_end - t.i_begin)), share = count / (total + count);
    const Acc *mean_c = mean_of[part] + c_begin, *m2_c = m2_of[part] + c_begin;
#pragma omp simd
    for (int64_t c = 0; c < c_end - c_begin; ++c) {
      const double delta = mean_c[c] - means[c];
      means[c] += delta * share;
      m2s[c] += m2_c[c] + delta * delta * total * share;
    }
    total += count;
  }
  for (int64_t c = c_begin; c < c_end; ++c) {
    mean[c] = static_cast<Acc>(total > 0 ? means[c - c_begin] : std::numeric_limits<double>::quiet_NaN());
    var[c] = static_cast<Acc>(m2s[c - c_begin] / total);  // 0/0 where empty
  }
}

// The sum of each channel of a block over all parts.
template <typename Acc>
FUSED_OPS_VECTORIZED void merge_sums(const Tiling& tiling, int64_t c_begin, int64_t c_end, const PerPart<Acc>& sum,
                                     double* total) {
  std::fill(total + c_begin, total + c_end, 0.0);
  for (int64_t part = 0; part < tiling.parts; ++part) {
    const Acc* sum_c = sum[part];
#pragma omp simd
    for (int64_t c = c_begin; c < c_end; ++c) total[c] += sum_c[c];
  }
}

// Rows of few channels that are taken as one, so that loops over channels, where these come last, are not too short: a
// power of 2 that divides all rows.
int64_t rows_side_by_side(const Layout& l) {
  int64_t rows = 1;
  while (l.inner == 1 && l.channels * rows < 32 && l.outer % (2 * rows) == 0 && l.outer > 0) rows *= 2;
  return rows;
}

// The n values, so many times one after the other.
template <typename Acc>
std::vector<Acc> repeated(const Acc* values, int64_t n, int64_t times) {
  std::vector<Acc> all(n * times);
  for (int64_t i = 0; i < times; ++i) std::copy(values, values + n, all.data() + i * n);
  return all;
}

// running ← (1 − momentum)·running + momentum·batch
template <typename Acc>
void move_running(Acc* running, const Acc* batch, Acc momentum, int64_t c_begin, int64_t c_end) {
  for (int64_t c = c_begin; c < c_end; ++c) running[c] = (1 - momentum) * running[c] + momentum * batch[c];
}

}  // namespace

std::tuple<Tensor, Tensor> batch_norm_forward(Tensor input, std::optional<Tensor> running_mean,
                                              std::optional<Tensor> running_var, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, bool training, double momentum, double eps,
                                              std::optional<Name> activation, std::optional<Tensor> residual) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should be (N, C, ...)");
  STD_TORCH_CHECK(training || (running_mean && running_var), "running statistics must be defined in evaluation mode");
  const bool channels_last = !input.is_contiguous() && is_like_channels_last(input);
  input = dense(input, channels_last);
  if (residual) residual = in_layout_of(input, channels_last, *residual, "residual");
  const Tiling tiling(layout_of(input, channels_last), /*two_passes=*/training);
  const Layout& l = tiling.layout;
  const int64_t C = l.channels, N = l.per_channel();
  const auto acc_type = accumulate_type(input.scalar_type());
  const auto weight_c = accumulated_vector(weight, C, input, "weight");
  const auto bias_c = accumulated_vector(bias, C, input, "bias");
  const auto running_mean_c = accumulated_vector(running_mean, C, input, "running_mean");
  const auto running_var_c = accumulated_vector(running_var, C, input, "running_var");
  Tensor y = on_huge_pages(empty_like_dense(input));
  Tensor stats = empty_beside(input, {2, C}, acc_type);

  dispatch_floating(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const T* x = input.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    Acc *mean = stats.mutable_data_ptr<Acc>(), *rstd = mean + C;
    const Acc *gamma = data_or_null<Acc>(weight_c), *beta = data_or_null<Acc>(bias_c);
    Acc* running_means = running_mean_c ? running_mean_c->mutable_data_ptr<Acc>() : nullptr;
    Acc* running_vars = running_var_c ? running_var_c->mutable_data_ptr<Acc>() : nullptr;
    std::vector<Acc> scale(C), var(C), zeros(beta ? 0 : C);
    const Passes<T> passes = passes_with<T>(activation);
    const PreActivation<T> z{x, data_or_null<T>(residual), mean, scale.data(), beta ? beta : zeros.data()};
    const auto scale_from_var = [&](int64_t c_begin, int64_t c_end) {
      for (int64_t c = c_begin; c < c_end; ++c) {
        rstd[c] = 1 / std::sqrt(var[c] + static_cast<Acc>(eps));
        scale[c] = gamma ? gamma[c] * rstd[c] : rstd[c];  // γ·r
      }
    };

    if (!training) {
      std::copy(running_means, running_means + C, mean);
      std::copy(running_vars, running_vars + C, var.data());
      scale_from_var(0, C);
      const auto apply = [&](const Tiling& tiling, const PreActivation<T>& z) {
        tiling.for_tiles([&](const Tile& t, int64_t) { passes.forward(tiling.layout, t, z, out, kStreamedAlone); });
      };
      const int64_t rows = rows_side_by_side(l);
      if (rows == 1) return apply(tiling, z);
      const auto means = repeated(z.mean, C, rows), scales = repeated(z.scale, C, rows),
                 biases = repeated(z.bias, C, rows);
      apply(Tiling({l.outer / rows, C * rows, 1}, false), {x, z.residual, means.data(), scales.data(), biases.data()});
      return;
    }
    const PerPart<Acc> mean_of(tiling), m2_of(tiling);
    tiling.for_tiles_twice([&](const Tile& t, int64_t part) { tile_moments<T>(l, t, x, mean_of[part], m2_of[part]); },
                           [&](int64_t c_begin, int64_t c_end) {
                             merge_moments(tiling, c_begin, c_end, mean_of, m2_of, mean, var.data());
                             scale_from_var(c_begin, c_end);
                             if (N == 0) return;
                             const Acc share = static_cast<Acc>(momentum),
                                       unbiased = static_cast<Acc>(N) / static_cast<Acc>(N - 1);
                             if (running_means) move_running(running_means, mean, share, c_begin, c_end);
                             for (int64_t c = c_begin; c < c_end; ++c) var[c] *= unbiased;
                             if (running_vars) move_running(running_vars, var.data(), share, c_begin, c_end);
                           },
                           [&](const Tile& t) { passes.forward(l, t, z, out, kStreamed); });
  });
  if (training && N > 0 && running_mean) copy_back(*running_mean, *running_mean_c);
  if (training && N > 0 && running_var) copy_back(*running_var, *running_var_c);
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(Tensor dy, Tensor input, std::optional<Tensor> weight,
                                                               std::optional<Tensor> bias,
                                                               std::optional<Tensor> residual, Tensor stats,
                                                               bool training, double /*eps, for second derivatives*/,
                                                               std::optional<Name> activation, bool needs_input,
                                                               bool needs_parameters, bool needs_residual) {
  STD_TORCH_CHECK(input.dim() >= 2, "input should be (N, C, ...)");
  const bool channels_last = !input.is_contiguous() && is_like_channels_last(input);
  input = dense(input, channels_last);
  dy = in_layout_of(input, channels_last, dy, "dy");
  if (residual) residual = in_layout_of(input, channels_last, *residual, "residual");
  const bool needs_sums = needs_parameters || (needs_input && training);
  const Tiling tiling(layout_of(input, channels_last), /*two_passes=*/needs_sums);
  const Layout& l = tiling.layout;
  const int64_t C = l.channels;
  const auto acc_type = accumulate_type(input.scalar_type());
  const auto weight_c = accumulated_vector(weight, C, input, "weight");
  const auto bias_c = accumulated_vector(bias, C, input, "bias");
  stats = dense_stats(stats, C, acc_type);

  // what is not needed comes back empty
  needs_residual = needs_residual && activation;  // without an activation it is dy
  Tensor dx_out = on_huge_pages(empty_like_dense(input, needs_input));
  Tensor dresidual_out = on_huge_pages(empty_like_dense(input, needs_residual));
  Tensor dweight_out = empty_beside(input, {needs_parameters ? C : 0}, acc_type);
  Tensor dbias_out = empty_beside(input, {needs_parameters ? C : 0}, acc_type);

  dispatch_floating(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const T* g = dy.const_data_ptr<T>();
    T* dx = needs_input ? dx_out.mutable_data_ptr<T>() : nullptr;
    T* dresidual = needs_residual ? dresidual_out.mutable_data_ptr<T>() : nullptr;
    const Acc *mean = stats.const_data_ptr<Acc>(), *rstd = mean + C;
    const Acc *gamma = data_or_null<Acc>(weight_c), *beta = data_or_null<Acc>(bias_c);
    std::vector<Acc> scale(C), zeros(beta ? 0 : C), dz_mean(C), x_hat_share(C);
    for (int64_t c = 0; c < C; ++c) scale[c] = gamma ? gamma[c] * rstd[c] : rstd[c];  // γ·r
    const PreActivation<T> z{input.const_data_ptr<T>(), data_or_null<T>(residual), mean, scale.data(),
                             beta ? beta : zeros.data()};
    const Passes<T> passes = passes_with<T>(activation), passes_from_dz = passes_with<T>(std::nullopt);
    Acc* dweight = needs_parameters ? dweight_out.mutable_data_ptr<Acc>() : nullptr;
    Acc* dbias = needs_parameters ? dbias_out.mutable_data_ptr<Acc>() : nullptr;
    const Means<Acc> means{training ? dz_mean.data() : nullptr, x_hat_share.data()};

    if (!needs_sums) {
      tiling.for_tiles([&](const Tile& t, int64_t) { passes.backward(l, t, z, g, means, dx, dresidual); });
      return;
    }
    // The second pass need not work dz out again, where T holds it without rounding: as dresidual or, if that is worth
    // it, in the place of dx.
    T* kept = !std::is_same_v<T, Acc> ? nullptr : (passes.cheap ? dresidual : (dresidual ? dresidual : dx));
    const PerPart<Acc> dz_sums(tiling), dz_distance_sums(tiling);
    std::vector<double> dz_sum(C), dz_distance_sum(C);  // over all parts
    tiling.for_tiles_twice(
        [&](const Tile& t, int64_t part) { passes.sums(l, t, z, g, dz_sums[part], dz_distance_sums[part], kept); },
        [&](int64_t c_begin, int64_t c_end) {
          merge_sums(tiling, c_begin, c_end, dz_sums, dz_sum.data());
          merge_sums(tiling, c_begin, c_end, dz_distance_sums, dz_distance_sum.data());
          const double N = static_cast<double>(l.per_channel());
          for (int64_t c = c_begin; c < c_end; ++c) {
            const double dz_x_hat_sum = N > 0 ? dz_distance_sum[c] * rstd[c] : 0;  // r is NaN of an empty batch
            dz_mean[c] = static_cast<Acc>(dz_sum[c] / N);
            x_hat_share[c] = static_cast<Acc>(rstd[c] * dz_x_hat_sum / N);
            if (!needs_parameters) continue;
            dbias[c] = static_cast<Acc>(dz_sum[c]);
            dweight[c] = static_cast<Acc>(dz_x_hat_sum);
          }
        },
        [&](const Tile& t) {
          if (kept && dx) passes_from_dz.backward(l, t, z, kept, means, dx, nullptr);
          if (!kept) passes.backward(l, t, z, g, means, dx, dresidual);
        });
  });
  return {dx_out, dweight_out, dbias_out, dresidual_out};
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&fused_ops::batch_norm_forward));
  m.impl("batch_norm_backward", TORCH_BOX(&fused_ops::batch_norm_backward));
}
