// Cross-entropy. Derivation and names: fused_ops/ops/cross_entropy.py.
//
// One block a row. It reads the row from memory once and then from cache: its maximum first, then the sums. Sums are
// taken in a fixed order, so a result is the same every time. Nothing is read back to the host: a target out of bounds
// stops the kernel with a device-side assertion.
#include <cassert>
#include <cstdio>
#include <limits>
#include <type_traits>

#include "../cross_entropy.h"
#include "block.cuh"

namespace fused_ops {
namespace {

// Threads of a row's largest block. In float64 a thread takes more registers than one of 1,024 threads has for each.
template <typename T>
constexpr int kMostThreads = kWarp * (std::is_same_v<T, double> ? kMaxWarps / 2 : kMaxWarps);

template <typename T>
int threads_for_row(int64_t C) {
  return std::min(threads_for(C), kMostThreads<T>);
}

// The rows as a kernel sees them.
template <typename T, typename Acc = accumulate_t<T>>
struct DeviceRows {
  const T* x;
  const Acc* w;      // or null
  const int64_t* y;  // null for class probabilities
  int64_t N, C, ignore_index;
  Acc label_smoothing, z_loss;

  explicit DeviceRows(const Rows& rows)
      : x(rows.logits.const_data_ptr<T>()),
        w(data_or_null<Acc>(rows.weight)),
        y(rows.probabilities ? nullptr : rows.target.const_data_ptr<int64_t>()),
        N(rows.R),
        C(rows.C),
        ignore_index(rows.ignore_index),
        label_smoothing(static_cast<Acc>(rows.label_smoothing)),
        z_loss(static_cast<Acc>(rows.z_loss)) {}

  // The row's class; 0, which is as good as any, where its target is class probabilities; -1 where it is ignored.
  __device__ int64_t target(int64_t n) const {
    if (!y) return 0;
    if (y[n] == ignore_index) return -1;
    const bool in_bounds = y[n] >= 0 && y[n] < C;
    if (!in_bounds) printf("Target %lld is out of bounds.\n", static_cast<long long>(y[n]));
    assert(in_bounds);
    return in_bounds ? y[n] : -1;
  }

  // What the row weighs in the mean.
  __device__ Acc weight(int64_t target) const { return y && w ? w[target] : Acc(1); }
};

// Σ t of a row, in every thread of its block; 0 for class indices without smoothing.
template <typename Acc, typename Targets>
__device__ Acc sum_targets(int64_t C, Targets t) {
  Acc sum = 0;
  if constexpr (Targets::kDense) {
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) sum += t(c, c);
    sum = block_sum(sum);
  }
  return sum;
}

template <typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    row_losses(DeviceRows<T> rows, Cap cap, Targets targets, Acc* m_out, Acc* log_z_out, Acc* losses) {
  for (int64_t n = blockIdx.x; n < rows.N; n += gridDim.x) {
    const T* x = rows.x + n * rows.C;
    const auto t = targets.row(n * rows.C);
    const Acc least = -std::numeric_limits<Acc>::infinity();
    Acc m = least;
    for (int64_t c = threadIdx.x; c < rows.C; c += blockDim.x) m = fmax(m, widen(x[c]));  // passes over a NaN
    m = cap(block_reduce(m, least, [](Acc a, Acc b) { return fmax(a, b); }));

    Acc z = 0, distance = 0;  // Σ exp(s − m), Σ t·(m − s)
    for (int64_t c = threadIdx.x; c < rows.C; c += blockDim.x) {
      const Acc s = cap(widen(x[c]));
      z += exp(s - m);
      if constexpr (Targets::kDense) distance += t(c, c) * (m - s);
    }
    z = block_sum(z);
    if constexpr (Targets::kDense) distance = block_sum(distance);
    const Acc t_sum = sum_targets<Acc>(rows.C, t);
    if (threadIdx.x > 0) continue;

    m = isnan(z) && isfinite(m) ? z : m;  // a NaN among the logits
    const Acc log_z = log(z), lse = m + log_z;
    const Acc dense = rows.C ? t_sum * log_z + distance : Acc(0);  // Σ t·(lse − s)
    const int64_t y = rows.target(n);
    Acc loss = 0;
    if constexpr (Targets::kProbabilities) {
      loss = dense;
    } else if (y >= 0) {
      loss = rows.weight(y) * (log_z - (cap(widen(x[y])) - m));
      if constexpr (Targets::kDense) loss = (1 - rows.label_smoothing) * loss + rows.label_smoothing / rows.C * dense;
    }
    if (y >= 0 && rows.z_loss != 0) loss += rows.z_loss * lse * lse;
    m_out[n] = m;
    log_z_out[n] = log_z;
    losses[n] = loss;
  }
}

// In one block: what the mean divides by, and the losses' sum or mean (`loss` is null where they are not reduced).
template <typename T, typename Acc = accumulate_t<T>>
__global__ void FUSED_OPS_ANY_BLOCK reduce_losses(DeviceRows<T> rows, const Acc* losses, bool mean, Acc* loss,
                                                  Acc* divisor) {
  double sum = 0, kept_weight = 0;
  for (int64_t n = threadIdx.x; n < rows.N; n += blockDim.x) {
    const int64_t y = rows.target(n);
    sum += losses[n];
    if (y >= 0) kept_weight += rows.weight(y);
  }
  sum = block_sum(sum);
  kept_weight = block_sum(kept_weight);
  if (threadIdx.x > 0) return;
  *divisor = static_cast<Acc>(kept_weight);
  if (loss) *loss = static_cast<Acc>(mean ? sum / kept_weight : sum);
}

// dx_c = g·(A·p_c − t_c)·k_c and dy_c = g·dt/dy·(lse − s_c), where not null. dx may lie where x does: a thread reads an
// element before it writes it, and nobody else reads it. `dlosses` is null for ones, `divisor` but for the mean.
template <typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    row_gradients(DeviceRows<T> rows, Cap cap, Targets targets, const Acc* m, const Acc* log_z, const Acc* dlosses,
                  bool per_row, const Acc* divisor, T* dlogits, T* dtarget) {
  const Acc share = rows.label_smoothing / rows.C;
  Acc w_sum = 0;  // Σ w, of smoothed class indices
  if constexpr (Targets::kDense && !Targets::kProbabilities) w_sum = sum_targets<Acc>(rows.C, targets);
  for (int64_t n = blockIdx.x; n < rows.N; n += gridDim.x) {
    const int64_t y = rows.target(n);
    const auto t = targets.row(n * rows.C);
    const Acc g = (dlosses ? dlosses[per_row ? n : 0] : Acc(1)) / (divisor ? *divisor : Acc(1));
    Acc nll_t = 0, t_sum = share * w_sum;  // what t has at the target alone; Σ t
    if constexpr (Targets::kProbabilities)
      t_sum = sum_targets<Acc>(rows.C, t);
    else
      nll_t = y < 0 ? Acc(0) : (1 - rows.label_smoothing) * rows.weight(y);
    const Acc A = nll_t + t_sum + 2 * rows.z_loss * (m[n] + log_z[n]);
    for (int64_t c = threadIdx.x; c < rows.C; c += blockDim.x) {
      const int64_t i = n * rows.C + c;
      const Acc s = cap(widen(rows.x[i])), neg_logp = log_z[n] - (s - m[n]);
      if constexpr (Targets::kProbabilities) {
        if (dlogits) dlogits[i] = narrow<T>(g * (A * exp(-neg_logp) - t(c, c)) * cap.slope(s));
        if (dtarget) dtarget[i] = narrow<T>(g * t.slope(c) * neg_logp);
      } else {
        const Acc t_c = share * t(c, c) + (c == y ? nll_t : Acc(0));
        dlogits[i] = y < 0 ? T(0) : narrow<T>(g * (A * exp(-neg_logp) - t_c) * cap.slope(s));
      }
    }
  }
}

// Launches row_gradients.
template <typename T, typename Acc = accumulate_t<T>>
void launch_gradients(const Rows& rows, const Acc* stats, const Acc* dlosses, const Acc* divisor, T* dlogits,
                      T* dtarget) {
  if (rows.R == 0 || rows.C == 0) return;
  dispatch_forms<T>(rows, [&](auto cap, auto targets) {
    launch(rows.logits, {rows.R, threads_for_row<T>(rows.C)}, row_gradients<T, decltype(cap), decltype(targets)>,
           DeviceRows<T>(rows), cap, targets, stats, stats + rows.R, dlosses, rows.per_row,
           rows.mean ? divisor : nullptr, dlogits, dtarget);
  });
}

template <typename T>
void launch_gradients(const Rows& rows, const RowGradients& gradients, T* dlogits, T* dtarget) {
  using Acc = accumulate_t<T>;
  launch_gradients<T>(rows, gradients.stats.const_data_ptr<Acc>(), gradients.dlosses.const_data_ptr<Acc>(),
                      gradients.divisor.const_data_ptr<Acc>(), dlogits, dtarget);
}

// dx times *dloss: where that is 1, as it mostly is, nothing is written. Rows that are ignored stay 0, as no number
// times 0 is NaN. Row n, one of D positions of C classes, has its elements D apart.
template <typename T, typename Acc = accumulate_t<T>>
__global__ void FUSED_OPS_ANY_BLOCK scale(T* dx, int64_t size, int64_t C, int64_t D, const Acc* dloss, const int64_t* y,
                                          int64_t ignore_index) {
  const Acc g = *dloss;
  if (g == 1) return;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    const bool ignored = !isfinite(g) && y && y[i / (C * D) * D + i % D] == ignore_index;
    dx[i] = ignored ? T(0) : narrow<T>(widen(dx[i]) * g);
  }
}

// (N, C, D) as rows of classes, (N·D, C); and back.
Tensor to_rows(const Tensor& t) {
  if (t.dim() != 3) return t;
  return torch::stable::flatten(as_contiguous(torch::stable::transpose(t, 1, 2)), 0, 1);
}

Tensor from_rows(const Tensor& rows, const Tensor& logits) {
  if (logits.dim() != 3 || rows.dim() != 2) return rows;
  const Tensor apart = torch::stable::view(rows, {logits.size(0), logits.size(2), logits.size(1)});
  return as_contiguous(torch::stable::transpose(apart, 1, 2));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target,
                                                                 std::optional<Tensor> weight, int64_t ignore_index,
                                                                 std::string reduction, double label_smoothing,
                                                                 double z_loss, std::optional<double> softcap,
                                                                 bool needs_logits) {
  const Rows rows(to_rows(logits), to_rows(target), weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  const auto acc_type = accumulate_type(logits.scalar_type());
  Tensor stats = empty_beside(logits, {2, rows.R}, acc_type);
  Tensor losses = empty_beside(logits, {rows.R}, acc_type);
  Tensor divisor = empty_beside(logits, {}, acc_type);
  Tensor loss = rows.per_row ? losses : empty_beside(logits, {}, acc_type);
  Tensor dlogits = gradient_or_nothing(rows, needs_logits);

  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const DeviceRows<T> on_device(rows);
    Acc* m = stats.mutable_data_ptr<Acc>();
    Acc* of_row = losses.mutable_data_ptr<Acc>();
    if (rows.R > 0)
      dispatch_forms<T>(rows, [&](auto cap, auto targets) {
        launch(logits, {rows.R, threads_for_row<T>(rows.C)}, row_losses<T, decltype(cap), decltype(targets)>, on_device,
               cap, targets, m, m + rows.R, of_row);
      });
    launch(logits, {1, threads_for(rows.R)}, reduce_losses<T>, on_device, of_row, rows.mean,
           rows.per_row ? nullptr : loss.mutable_data_ptr<Acc>(), divisor.mutable_data_ptr<Acc>());
    if (dlogits.numel())
      launch_gradients<T, Acc>(rows, m, nullptr, divisor.const_data_ptr<Acc>(), dlogits.mutable_data_ptr<T>(), nullptr);
  });
  return {loss, stats, divisor, from_rows(dlogits, logits)};
}

void cross_entropy_scale_(Tensor dlogits, Tensor dloss, Tensor target, int64_t ignore_index) {
  STD_TORCH_CHECK(dlogits.is_contiguous() && dloss.numel() == 1, "dlogits should be contiguous, dloss one element");
  const Rows rows(dlogits, target, std::nullopt, ignore_index, "mean", 0, 0, std::nullopt);
  const Tensor factor = as_type(dloss, accumulate_type(dlogits.scalar_type()));
  check_same_device(factor, dlogits, "dloss");
  const int64_t size = dlogits.numel();
  if (size > 0)
    dispatch_floating(dlogits.scalar_type(), "cross_entropy", [&](auto scalar) {
      using T = decltype(scalar);
      launch(dlogits, {std::min<int64_t>(size / 1024 + 1, 4096), 256}, scale<T>, dlogits.mutable_data_ptr<T>(), size,
             rows.C, rows.D, factor.const_data_ptr<accumulate_t<T>>(),
             rows.probabilities ? nullptr : rows.target.const_data_ptr<int64_t>(), ignore_index);
    });
}

std::tuple<Tensor, Tensor> cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target,
                                                  std::optional<Tensor> weight, Tensor stats, Tensor divisor,
                                                  int64_t ignore_index, std::string reduction, double label_smoothing,
                                                  double z_loss, std::optional<double> softcap, bool needs_logits,
                                                  bool needs_target) {
  const Rows rows(to_rows(logits), to_rows(target), weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  const RowGradients gradients(rows, dloss, stats, divisor);
  Tensor dlogits = gradient_or_nothing(rows, needs_logits);
  Tensor dtarget = gradient_or_nothing(rows, needs_target && rows.probabilities);
  if (dlogits.numel() || dtarget.numel())
    dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
      using T = decltype(scalar);
      launch_gradients<T>(rows, gradients, data_or_null<T>(dlogits), data_or_null<T>(dtarget));
    });
  return {from_rows(dlogits, logits), from_rows(dtarget, logits)};
}

Tensor cross_entropy_backward_(Tensor dloss, Tensor logits, Tensor target, std::optional<Tensor> weight, Tensor stats,
                               Tensor divisor, int64_t ignore_index, std::string reduction, double label_smoothing,
                               double z_loss, std::optional<double> softcap, bool needs_target) {
  STD_TORCH_CHECK(logits.is_contiguous(), "logits should be contiguous, to be written over");
  const Rows rows(to_rows(logits), to_rows(target), weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  const RowGradients gradients(rows, dloss, stats, divisor);
  Tensor dlogits = rows.logits;  // the logits themselves, but for those of positions
  Tensor dtarget = gradient_or_nothing(rows, needs_target && rows.probabilities);
  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    launch_gradients<T>(rows, gradients, dlogits.mutable_data_ptr<T>(), data_or_null<T>(dtarget));
  });
  if (logits.dim() == 3) torch::stable::copy_(logits, from_rows(dlogits, logits));
  return from_rows(dtarget, logits);
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fused_ops::cross_entropy_forward));
  m.impl("cross_entropy_scale_", TORCH_BOX(&fused_ops::cross_entropy_scale_));
  m.impl("cross_entropy_backward", TORCH_BOX(&fused_ops::cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&fused_ops::cross_entropy_backward_));
}
