// Cross-entropy. Derivation and names: fused_ops/ops/cross_entropy.py.
//
// A row is read from memory once and then from cache: its maximum first, then the sums. Rows are independent, so the
// result does not depend on the number of threads.
#include "../cross_entropy.h"

#include <limits>
#include <stdexcept>
#include <vector>

#include "huge_pages.h"
#include "vectorize.h"

namespace fused_ops {
namespace {

// What the loss of one row is made of: m = max s, z = Σ exp(s − m), t_sum = Σ t, distance = Σ t·(m − s).
template <typename Acc>
struct RowSums {
  Acc m, z, t_sum, distance;
};

template <typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void sum_row(const T* x, int64_t C, Cap cap, Targets t, RowSums<Acc>* sums) {
  Acc largest = -std::numeric_limits<Acc>::infinity(), z = 0, t_sum = 0, distance = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t c = 0; c < C; ++c) {
    const Acc x_c = widen(x[c]);
    largest = largest < x_c ? x_c : largest;  // passes over a NaN
  }
  Acc m = cap(largest);
#pragma omp simd reduction(+ : z)
  for (int64_t c = 0; c < C; ++c) z += exp_of_softmax(cap(widen(x[c])) - m);
  if constexpr (Targets::kDense) {
#pragma omp simd reduction(+ : t_sum, distance)
    for (int64_t c = 0; c < C; ++c) {
      const Acc t_c = t(c);
      t_sum += t_c;
      distance += t_c * (m - cap(widen(x[c])));
    }
  }
  if (std::isnan(z) && std::isfinite(m)) m = z;  // a NaN among the logits
  *sums = {m, z, t_sum, distance};
}

// Σ t of a row alone.
template <typename Acc, typename Targets>
FUSED_OPS_VECTORIZED void sum_targets(int64_t C, Targets t, Acc* t_sum) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < C; ++c) sum += static_cast<Acc>(t(c));
  *t_sum = sum;
}

// dx_c = (gA·p_c − g_t·t_c)·k_c, with p_c = exp(s_c − m − log_z). dx may lie where x does.
template <typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void row_gradient(const T* x, int64_t C, Cap cap, Targets t, Acc m, Acc log_z, Acc gA, Acc g_t,
                                       T* dx) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    const Acc s = cap(widen(x[c]));
    dx[c] = narrow<T>((gA * exp_of_softmax(s - m - log_z) - g_t * t(c)) * cap.slope(s));
  }
}

// dy_c = g·dt/dy·(lse − s_c)
template <typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void target_gradient(const T* x, int64_t C, Cap cap, Targets t, Acc m, Acc log_z, Acc g, T* dy) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) dy[c] = narrow<T>(g * t.slope(c) * (log_z - (cap(widen(x[c])) - m)));
}

// Throws where a target is out of bounds: later, inside parallel_for, nothing may.
void check_targets(const Rows& rows) {
  if (rows.probabilities) return;
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

// The class indices and their weights.
template <typename Acc>
struct Classes {
  const int64_t* y;  // null for class probabilities
  const Acc* w;      // null without weights
  int64_t ignore_index;

  explicit Classes(const Rows& rows)
      : y(rows.probabilities ? nullptr : rows.target.const_data_ptr<int64_t>()),
        w(data_or_null<Acc>(rows.weight)),
        ignore_index(rows.ignore_index) {}

  bool ignored(int64_t n) const { return y && y[n] == ignore_index; }
  Acc weight(int64_t n) const { return y && w ? w[y[n]] : Acc(1); }
};

// The gradient of every row, dx (which may be the logits themselves) and dy, where not null.
template <typename T>
void row_gradients(const Rows& rows, const RowGradients& gradients, T* dx, T* dy) {
  using Acc = accumulate_t<T>;
  const int64_t N = rows.N, C = rows.C;
  const T* x = rows.logits.const_data_ptr<T>();
  const Classes<Acc> classes(rows);
  const Acc *m = gradients.stats.const_data_ptr<Acc>(), *log_z = m + N;
  const Acc* dlosses = gradients.dlosses.const_data_ptr<Acc>();
  const Acc divisor = rows.mean ? *gradients.divisor.const_data_ptr<Acc>() : Acc(1);
  const Acc share = static_cast<Acc>(rows.label_smoothing / std::max<int64_t>(1, C));

  dispatch_forms<T>(rows, [&](auto cap, auto targets) {
    using Targets = decltype(targets);
    Acc w_sum = 0;  // Σ w, of smoothed class indices
    if constexpr (Targets::kDense && !Targets::kProbabilities) sum_targets(C, targets, &w_sum);

    for_each_row(rows, [&](int64_t n) {
      const T* x_n = x + n * C;
      T* dx_n = dx ? dx + n * C : nullptr;
      if (classes.ignored(n)) return std::fill(dx_n, dx_n + C, T(0));
      const Acc g = dlosses[rows.per_row ? n : 0] / divisor;
      const Acc z_slope = static_cast<Acc>(2 * rows.z_loss) * (m[n] + log_z[n]);  // of ζ·lse² by lse
      const auto t = targets.row(n * C);
      if constexpr (Targets::kProbabilities) {
        if (dy) target_gradient<T>(x_n, C, cap, t, m[n], log_z[n], g, dy + n * C);
        if (!dx) return;
        Acc t_sum;
        sum_targets(C, t, &t_sum);
        row_gradient<T>(x_n, C, cap, t, m[n], log_z[n], g * (t_sum + z_slope), g, dx_n);
      } else {
        const Acc w_y = classes.weight(n), nll_t = static_cast<Acc>(1 - rows.label_smoothing) * w_y;
        const Acc gA = g * (nll_t + share * w_sum + z_slope);
        const int64_t y = classes.y[n];
        const Acc s_y = cap(widen(x_n[y])), p_y = exp_of_softmax(s_y - m[n] - log_z[n]);  // read before dx is written
        row_gradient<T>(x_n, C, cap, t, m[n], log_z[n], gA, g * share, dx_n);
        dx_n[y] = narrow<T>((gA * p_y - g * (nll_t + share * w_y)) * cap.slope(s_y));
      }
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                         int64_t ignore_index, std::string reduction,
                                                         double label_smoothing, double z_loss,
                                                         std::optional<double> softcap) {
  const Rows rows(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  check_targets(rows);
  const int64_t N = rows.N, C = rows.C;
  const auto acc_type = accumulate_type(logits.scalar_type());
  Tensor stats = torch::stable::new_empty(logits, {2, N}, acc_type);
  Tensor divisor = torch::stable::new_empty(logits, {}, acc_type);
  Tensor loss =
      rows.per_row ? torch::stable::new_empty(logits, {N}, acc_type) : torch::stable::new_empty(logits, {}, acc_type);

  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const T* x = rows.logits.template const_data_ptr<T>();
    const Classes<Acc> classes(rows);
    Acc *m = stats.mutable_data_ptr<Acc>(), *log_z = m + N;
    const Acc share = static_cast<Acc>(label_smoothing / std::max<int64_t>(1, C));
    std::vector<Acc> scratch(rows.per_row ? 0 : N);
    Acc* losses = rows.per_row ? loss.mutable_data_ptr<Acc>() : scratch.data();

    dispatch_forms<T>(rows, [&](auto cap, auto targets) {
      using Targets = decltype(targets);
      for_each_row(rows, [&](int64_t n) {
        RowSums<Acc> row;
        sum_row<T>(x + n * C, C, cap, targets.row(n * C), &row);
        m[n] = row.m;
        log_z[n] = std::log(row.z);
        losses[n] = 0;
        if (classes.ignored(n)) return;
        const Acc dense = C ? row.t_sum * log_z[n] + row.distance : Acc(0);  // Σ t·(lse − s)
        if constexpr (Targets::kProbabilities) {
          losses[n] = dense;
        } else {
          losses[n] = classes.weight(n) * (log_z[n] - (cap(widen(x[n * C + classes.y[n]])) - row.m));
          if constexpr (Targets::kDense) losses[n] = static_cast<Acc>(1 - label_smoothing) * losses[n] + share * dense;
        }
        const Acc lse = row.m + log_z[n];
        if (z_loss != 0) losses[n] += static_cast<Acc>(z_loss) * lse * lse;
      });
    });

    // In order and in double: the same sum whatever the number of threads.
    double loss_sum = 0, kept_weight = 0;
    for (int64_t n = 0; n < N; ++n) {
      loss_sum += losses[n];
      if (!classes.ignored(n)) kept_weight += classes.weight(n);
    }
    *divisor.mutable_data_ptr<Acc>() = static_cast<Acc>(kept_weight);
    if (!rows.per_row) *loss.mutable_data_ptr<Acc>() = static_cast<Acc>(rows.mean ? loss_sum / kept_weight : loss_sum);
  });
  return {loss, stats, divisor};
}

std::tuple<Tensor, Tensor> cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target,
                                                  std::optional<Tensor> weight, Tensor stats, Tensor divisor,
                                                  int64_t ignore_index, std::string reduction, double label_smoothing,
                                                  double z_loss, std::optional<double> softcap, bool needs_logits,
                                                  bool needs_target) {
  const Rows rows(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  check_targets(rows);
  const RowGradients gradients(rows, dloss, stats, divisor);
  Tensor dlogits = on_huge_pages(gradient_or_nothing(rows, needs_logits));
  Tensor dtarget = on_huge_pages(gradient_or_nothing(rows, needs_target && rows.probabilities));
  if (dlogits.numel() || dtarget.numel())
    dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
      using T = decltype(scalar);
      row_gradients<T>(rows, gradients, data_or_null<T>(dlogits), data_or_null<T>(dtarget));
    });
  return {dlogits, dtarget};
}

Tensor cross_entropy_backward_(Tensor dloss, Tensor logits, Tensor target, std::optional<Tensor> weight, Tensor stats,
                               Tensor divisor, int64_t ignore_index, std::string reduction, double label_smoothing,
                               double z_loss, std::optional<double> softcap, bool needs_target) {
  STD_TORCH_CHECK(logits.is_contiguous(), "logits should be contiguous, to be written over");
  const Rows rows(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  check_targets(rows);
  const RowGradients gradients(rows, dloss, stats, divisor);
  Tensor dtarget = on_huge_pages(gradient_or_nothing(rows, needs_target && rows.probabilities));
  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    row_gradients<T>(rows, gradients, logits.mutable_data_ptr<T>(), data_or_null<T>(dtarget));
  });
  return dtarget;
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fused_ops::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&fused_ops::cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&fused_ops::cross_entropy_backward_));
}
