// Cross-entropy of class indices. Derivation and names: fused_ops/ops/cross_entropy.py.
//
// A row is read from memory once and then from cache: its maximum first, then the sums. Rows are independent, so the
// result does not depend on the number of threads.
#include "../cross_entropy.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "vectorize.h"

namespace fused_ops {
namespace {

// What the loss of one row is made of: m = max x, z = Σ exp(x − m), smooth = Σ w·(m − x).
template <typename Acc>
struct RowSums {
  Acc m, z, smooth;
};

template <typename T>
FUSED_OPS_VECTORIZED void sum_row(const T* x, const T* w, int64_t C, bool smoothing, RowSums<accumulate_t<T>>* sums) {
  using Acc = accumulate_t<T>;
  Acc m = -std::numeric_limits<Acc>::infinity(), z = 0, smooth = 0;
#pragma omp simd reduction(max : m)
  for (int64_t c = 0; c < C; ++c) {
    const Acc x_c = widen(x[c]);
    m = m < x_c ? x_c : m;  // passes over a NaN
  }
#pragma omp simd reduction(+ : z)
  for (int64_t c = 0; c < C; ++c) z += exp(widen(x[c]) - m);
  if (smoothing && w) {
#pragma omp simd reduction(+ : smooth)
    for (int64_t c = 0; c < C; ++c) smooth += widen(w[c]) * (m - widen(x[c]));
  } else if (smoothing) {
#pragma omp simd reduction(+ : smooth)
    for (int64_t c = 0; c < C; ++c) smooth += m - widen(x[c]);
  }
  if (std::isnan(z) && std::isfinite(m)) m = z;  // a NaN among the logits
  *sums = {m, z, smooth};
}

// dx_c = gT·p_c − g_smooth·w_c, with p_c = exp(x_c − m − log_z): the whole gradient but for the target's own term.
template <typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void row_gradient(const T* x, const T* w, int64_t C, Acc m, Acc log_z, Acc gT, Acc g_smooth,
                                       T* dx) {
  if (w) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) dx[c] = narrow<T>(gT * exp(widen(x[c]) - m - log_z) - g_smooth * widen(w[c]));
  } else {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) dx[c] = narrow<T>(gT * exp(widen(x[c]) - m - log_z) - g_smooth);
  }
}

// Σ_c w_c, where there are no weights C.
template <typename T, typename Acc = accumulate_t<T>>
Acc sum_weights(const T* w, int64_t C) {
  if (!w) return static_cast<Acc>(C);
  double sum = 0;
  for (int64_t c = 0; c < C; ++c) sum += widen(w[c]);
  return static_cast<Acc>(sum);
}

// Throws where a target is out of bounds: later, inside parallel_for, nothing may.
void check_targets(const Rows& rows) {
  const int64_t* y = rows.target.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < rows.N; ++n)
    if (y[n] != rows.ignore_index && (y[n] < 0 || y[n] >= rows.C))
      throw std::out_of_range("Target " + std::to_string(y[n]) + " is out of bounds.");
}

// Calls f(n) for every row.
template <typename F>
void for_each_row(const Rows& rows, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, rows.C));
  torch::stable::parallel_for(0, rows.N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                         int64_t ignore_index, std::string reduction,
                                                         double label_smoothing) {
  const Rows rows(logits, target, weight, ignore_index);
  check_targets(rows);
  const int64_t N = rows.N, C = rows.C;
  const auto acc_type = accumulate_type(logits.scalar_type());
  Tensor stats = torch::stable::new_empty(logits, {2, N}, acc_type);
  Tensor weight_sum = torch::stable::new_empty(logits, {}, acc_type);
  Tensor loss;

  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const T* x = rows.logits.template const_data_ptr<T>();
    const T* w = data_or_null<T>(rows.weight);
    const int64_t* y = rows.target.const_data_ptr<int64_t>();
    Acc* m = stats.mutable_data_ptr<Acc>();
    Acc* log_z = m + N;
    const bool smoothing = label_smoothing > 0;
    const Acc w_sum = sum_weights<T>(w, C);

    std::vector<Acc> losses(N);
    for_each_row(rows, [&](int64_t n) {
      RowSums<Acc> row;
      sum_row(x + n * C, w, C, smoothing, &row);
      m[n] = row.m;
      log_z[n] = std::log(row.z);
      if (y[n] == ignore_index) return;
      const Acc w_y = w ? widen(w[y[n]]) : Acc(1);
      losses[n] = w_y * (log_z[n] - (widen(x[n * C + y[n]]) - row.m));
      if (smoothing) {
        const Acc smooth = w_sum * log_z[n] + row.smooth;  // Σ_c w_c·(lse − x_c)
        losses[n] = static_cast<Acc>(1 - label_smoothing) * losses[n] + static_cast<Acc>(label_smoothing / C) * smooth;
      }
    });

    // In order and in double: the same sum whatever the number of threads.
    double loss_sum = 0, kept_weight = 0;
    for (int64_t n = 0; n < N; ++n) {
      loss_sum += losses[n];
      if (y[n] != ignore_index) kept_weight += w ? static_cast<double>(widen(w[y[n]])) : 1.0;
    }
    *weight_sum.mutable_data_ptr<Acc>() = static_cast<Acc>(kept_weight);
    if (is_per_row(reduction)) {
      loss = torch::stable::new_empty(logits, {N});
      T* out = loss.mutable_data_ptr<T>();
      for (int64_t n = 0; n < N; ++n) out[n] = narrow<T>(losses[n]);
    } else {
      loss = torch::stable::new_empty(logits, {});
      *loss.mutable_data_ptr<T>() = narrow<T>(static_cast<Acc>(is_mean(reduction) ? loss_sum / kept_weight : loss_sum));
    }
  });
  return {loss, stats, weight_sum};
}

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, std::optional<Tensor> weight, Tensor stats,
                              Tensor weight_sum, int64_t ignore_index, std::string reduction, double label_smoothing) {
  const Rows rows(logits, target, weight, ignore_index);
  check_targets(rows);
  const int64_t N = rows.N, C = rows.C;
  const bool per_row = is_per_row(reduction);
  const RowGradients gradients(rows, dloss, stats, weight_sum, per_row);
  Tensor dlogits = torch::stable::new_empty(logits, {N, C});

  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const T* x = rows.logits.template const_data_ptr<T>();
    const T* w = data_or_null<T>(rows.weight);
    const int64_t* y = rows.target.const_data_ptr<int64_t>();
    const Acc* m = gradients.stats.template const_data_ptr<Acc>();
    const Acc* log_z = m + N;
    const Acc* g = gradients.dlosses.template const_data_ptr<Acc>();
    T* dx = dlogits.mutable_data_ptr<T>();
    const Acc divisor = is_mean(reduction) ? *gradients.weight_sum.template const_data_ptr<Acc>() : Acc(1);
    const Acc smooth_t = static_cast<Acc>(label_smoothing / std::max<int64_t>(1, C));
    const Acc w_sum = sum_weights<T>(w, C);

    for_each_row(rows, [&](int64_t n) {
      T* dx_n = dx + n * C;
      if (y[n] == ignore_index) return std::fill(dx_n, dx_n + C, T(0));
      const T* x_n = x + n * C;
      const Acc w_y = w ? widen(w[y[n]]) : Acc(1);
      const Acc nll_t = static_cast<Acc>(1 - label_smoothing) * w_y;
      const Acc g_n = g[per_row ? n : 0] / divisor;
      const Acc gT = g_n * (nll_t + smooth_t * w_sum);
      row_gradient<T>(x_n, w, C, m[n], log_z[n], gT, g_n * smooth_t, dx_n);
      const Acc p_y = exp(widen(x_n[y[n]]) - m[n] - log_z[n]);
      dx_n[y[n]] = narrow<T>(gT * p_y - g_n * (nll_t + smooth_t * w_y));
    });
  });
  return dlogits;
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fused_ops::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&fused_ops::cross_entropy_backward));
}
