// Cross-entropy of class indices. Derivation and names: fused_ops/ops/cross_entropy.py.
//
// A row is read from memory once and then from cache: its maximum first, then the sums. Rows are independent, so the
// result does not depend on the number of threads.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../checks.h"
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

// The rows of a batch and their targets, checked: what forward and backward have in common.
struct Rows {
  Tensor logits, target;
  std::optional<Tensor> weight;
  int64_t N, C, ignore_index;
  const int64_t* y;

  Rows(const Tensor& logits_, const Tensor& target_, const std::optional<Tensor>& weight_, int64_t ignore_index)
      : logits(torch::stable::contiguous(logits_)),
        target(torch::stable::contiguous(target_)),
        weight(contiguous(weight_)),
        ignore_index(ignore_index) {
    STD_TORCH_CHECK(logits.dim() == 2, "logits should be (N, C)");
    N = logits.size(0);
    C = logits.size(1);
    check_vector(target, N, ScalarType::Long, "target");
    if (weight) check_vector(*weight, C, logits.scalar_type(), "weight");
    y = target.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < N; ++n)
      if (kept(n) && (y[n] < 0 || y[n] >= C))
        throw std::out_of_range("Target " + std::to_string(y[n]) + " is out of bounds.");
  }

  bool kept(int64_t n) const { return y[n] != ignore_index; }

  template <typename F>
  void parallel(const F& f) const {
    torch::stable::parallel_for(0, N, std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, C)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t n = begin; n < end; ++n) f(n);
                                });
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                         int64_t ignore_index, std::string reduction,
                                                         double label_smoothing) {
  const Rows rows(logits, target, weight, ignore_index);
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
    Acc* m = stats.mutable_data_ptr<Acc>();
    Acc* log_z = m + N;
    const bool smoothing = label_smoothing > 0;
    const Acc w_sum = sum_weights<T>(w, C);

    std::vector<Acc> losses(N);
    rows.parallel([&](int64_t n) {
      RowSums<Acc> row;
      sum_row(x + n * C, w, C, smoothing, &row);
      m[n] = row.m;
      log_z[n] = std::log(row.z);
      if (!rows.kept(n)) return;
      const int64_t y = rows.y[n];
      const Acc w_y = w ? widen(w[y]) : Acc(1);
      losses[n] = w_y * (log_z[n] - (widen(x[n * C + y]) - row.m));
      if (smoothing) {
        const Acc smooth = w_sum * log_z[n] + row.smooth;  // Σ_c w_c·(lse − x_c)
        losses[n] = static_cast<Acc>(1 - label_smoothing) * losses[n] + static_cast<Acc>(label_smoothing / C) * smooth;
      }
    });

    // In order and in double: the same sum whatever the number of threads.
    double loss_sum = 0, kept_weight = 0;
    for (int64_t n = 0; n < N; ++n) {
      loss_sum += losses[n];
      if (rows.kept(n)) kept_weight += w ? static_cast<double>(widen(w[rows.y[n]])) : 1.0;
    }
    *weight_sum.mutable_data_ptr<Acc>() = static_cast<Acc>(kept_weight);
    if (reduction == "none") {
      loss = torch::stable::new_empty(logits, {N});
      T* out = loss.mutable_data_ptr<T>();
      for (int64_t n = 0; n < N; ++n) out[n] = narrow<T>(losses[n]);
    } else {
      loss = torch::stable::new_empty(logits, {});
      *loss.mutable_data_ptr<T>() =
          narrow<T>(static_cast<Acc>(reduction == "mean" ? loss_sum / kept_weight : loss_sum));
    }
  });
  return {loss, stats, weight_sum};
}

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, std::optional<Tensor> weight, Tensor stats,
                              Tensor weight_sum, int64_t ignore_index, std::string reduction, double label_smoothing) {
  const Rows rows(logits, target, weight, ignore_index);
  const int64_t N = rows.N, C = rows.C;
  const auto acc_type = accumulate_type(logits.scalar_type());
  const bool per_row = reduction == "none";
  const Tensor dlosses = torch::stable::contiguous(torch::stable::to(dloss, acc_type));
  stats = torch::stable::contiguous(stats);
  STD_TORCH_CHECK(dlosses.numel() == (per_row ? N : 1), "dloss should have an element for each loss");
  STD_TORCH_CHECK(stats.numel() == 2 * N && stats.scalar_type() == acc_type, "stats should be (2, N)");
  STD_TORCH_CHECK(weight_sum.numel() == 1 && weight_sum.scalar_type() == acc_type, "weight_sum should be a scalar");
  Tensor dlogits = torch::stable::new_empty(logits, {N, C});

  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const T* x = rows.logits.template const_data_ptr<T>();
    const T* w = data_or_null<T>(rows.weight);
    const Acc* m = stats.const_data_ptr<Acc>();
    const Acc* log_z = m + N;
    const Acc* g = dlosses.const_data_ptr<Acc>();
    T* dx = dlogits.mutable_data_ptr<T>();
    const Acc divisor = reduction == "mean" ? *weight_sum.const_data_ptr<Acc>() : Acc(1);
    const Acc smooth_t = static_cast<Acc>(label_smoothing / std::max<int64_t>(1, C));
    const Acc w_sum = sum_weights<T>(w, C);

    rows.parallel([&](int64_t n) {
      T* dx_n = dx + n * C;
      if (!rows.kept(n)) return std::fill(dx_n, dx_n + C, T(0));
      const int64_t y = rows.y[n];
      const T* x_n = x + n * C;
      const Acc nll_t = static_cast<Acc>(1 - label_smoothing) * (w ? widen(w[y]) : Acc(1));
      const Acc g_n = g[per_row ? n : 0] / divisor;
      const Acc gT = g_n * (nll_t + smooth_t * w_sum);
      row_gradient<T>(x_n, w, C, m[n], log_z[n], gT, g_n * smooth_t, dx_n);
      const Acc p_y = exp(widen(x_n[y]) - m[n] - log_z[n]);
      const Acc t_y = nll_t + smooth_t * (w ? widen(w[y]) : Acc(1));
      dx_n[y] = narrow<T>(gT * p_y - g_n * t_y);
    });
  });
  return dlogits;
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fused_ops::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&fused_ops::cross_entropy_backward));
}
