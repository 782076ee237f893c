// Cross-entropy of class indices. Derivation and names: fused_ops/ops/cross_entropy.py.
//
// One block a row. It reads the row from memory once and then from cache: its maximum first, then the sums. Sums are
// taken in a fixed order, so a result is the same every time. Nothing is read back to the host: a target out of bounds
// stops the kernel with a device-side assertion.
#include <cassert>
#include <cstdio>
#include <limits>

#include "../cross_entropy.h"
#include "block.cuh"

namespace fused_ops {
namespace {

// The rows as a kernel sees them.
template <typename T>
struct DeviceRows {
  const T* x;
  const T* w;  // or null
  const int64_t* y;
  int64_t N, C, ignore_index;

  explicit DeviceRows(const Rows& rows)
      : x(rows.logits.const_data_ptr<T>()),
        w(data_or_null<T>(rows.weight)),
        y(rows.target.const_data_ptr<int64_t>()),
        N(rows.N),
        C(rows.C),
        ignore_index(rows.ignore_index) {}

  __device__ accumulate_t<T> weight(int64_t c) const { return w ? widen(w[c]) : accumulate_t<T>(1); }

  // The row's target, or -1 where it is ignored.
  __device__ int64_t target(int64_t n) const {
    if (y[n] == ignore_index) return -1;
    const bool in_bounds = y[n] >= 0 && y[n] < C;
    if (!in_bounds) printf("Target %lld is out of bounds.\n", static_cast<long long>(y[n]));
    assert(in_bounds);
    return in_bounds ? y[n] : -1;
  }
};

template <typename T, typename Acc = accumulate_t<T>>
__global__ void row_losses(DeviceRows<T> rows, Acc label_smoothing, Acc* m_out, Acc* log_z_out, Acc* losses) {
  for (int64_t n = blockIdx.x; n < rows.N; n += gridDim.x) {
    const T* x = rows.x + n * rows.C;
    const Acc least = -std::numeric_limits<Acc>::infinity();
    Acc m = least;
    for (int64_t c = threadIdx.x; c < rows.C; c += blockDim.x) m = fmax(m, widen(x[c]));  // passes over a NaN
    m = block_reduce(m, least, [](Acc a, Acc b) { return fmax(a, b); });

    Acc z = 0, smooth = 0, w_sum = 0;  // Σ exp(x − m), Σ w·(m − x), Σ w
    for (int64_t c = threadIdx.x; c < rows.C; c += blockDim.x) {
      z += exp(widen(x[c]) - m);
      if (label_smoothing > 0) {
        smooth += rows.weight(c) * (m - widen(x[c]));
        w_sum += rows.weight(c);
      }
    }
    z = block_sum(z);
    if (label_smoothing > 0) {
      smooth = block_sum(smooth);
      w_sum = block_sum(w_sum);
    }
    if (threadIdx.x > 0) continue;

    const Acc log_z = log(z);
    const int64_t y = rows.target(n);
    Acc loss = 0;
    if (y >= 0) loss = rows.weight(y) * (log_z - (widen(x[y]) - m));
    if (y >= 0 && label_smoothing > 0)
      loss = (1 - label_smoothing) * loss + label_smoothing / rows.C * (w_sum * log_z + smooth);
    m_out[n] = isnan(z) && isfinite(m) ? z : m;  // a NaN among the logits
    log_z_out[n] = log_z;
    losses[n] = loss;
  }
}

// In one block: Σ w_y over the rows kept, and the losses' sum, mean, or (per_row) themselves in the dtype of the
// logits.
template <typename T, typename Acc = accumulate_t<T>>
__global__ void reduce_losses(DeviceRows<T> rows, const Acc* losses, bool per_row, bool mean, T* out, Acc* weight_sum) {
  double sum = 0, kept_weight = 0;
  for (int64_t n = threadIdx.x; n < rows.N; n += blockDim.x) {
    const int64_t y = rows.target(n);
    sum += losses[n];
    if (y >= 0) kept_weight += rows.weight(y);
    if (per_row) out[n] = narrow<T>(losses[n]);
  }
  sum = block_sum(sum);
  kept_weight = block_sum(kept_weight);
  if (threadIdx.x > 0) return;
  *weight_sum = static_cast<Acc>(kept_weight);
  if (!per_row) *out = narrow<T>(static_cast<Acc>(mean ? sum / kept_weight : sum));
}

// dx_c = g·(T·p_c − t_c), with p_c = exp(x_c − m − log_z); `weight_sum` is null but for the mean.
template <typename T, typename Acc = accumulate_t<T>>
__global__ void row_gradients(DeviceRows<T> rows, const Acc* m, const Acc* log_z, const Acc* dlosses, bool per_row,
                              const Acc* weight_sum, Acc label_smoothing, T* dlogits) {
  const Acc smooth_t = label_smoothing / rows.C;  // what t has at every class, but for its weight
  Acc w_sum = 0;
  if (label_smoothing > 0) {
    for (int64_t c = threadIdx.x; c < rows.C; c += blockDim.x) w_sum += rows.weight(c);
    w_sum = block_sum(w_sum);
  }
  for (int64_t n = blockIdx.x; n < rows.N; n += gridDim.x) {
    const T* x = rows.x + n * rows.C;
    T* dx = dlogits + n * rows.C;
    const int64_t y = rows.target(n);
    const Acc nll_t = y < 0 ? Acc(0) : (1 - label_smoothing) * rows.weight(y);  // what t has at the target alone
    const Acc g = dlosses[per_row ? n : 0] / (weight_sum ? *weight_sum : Acc(1));
    const Acc gT = g * (nll_t + smooth_t * w_sum);
    for (int64_t c = threadIdx.x; c < rows.C; c += blockDim.x) {
      const Acc t = (c == y ? nll_t : Acc(0)) + (label_smoothing > 0 ? smooth_t * rows.weight(c) : Acc(0));
      const Acc p = exp(widen(x[c]) - m[n] - log_z[n]);
      dx[c] = y < 0 ? T(0) : narrow<T>(gT * p - g * t);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                         int64_t ignore_index, std::string reduction,
                                                         double label_smoothing) {
  const Rows rows(logits, target, weight, ignore_index);
  const auto acc_type = accumulate_type(logits.scalar_type());
  const bool per_row = is_per_row(reduction);
  Tensor stats = torch::stable::new_empty(logits, {2, rows.N}, acc_type);
  Tensor losses = torch::stable::new_empty(logits, {rows.N}, acc_type);
  Tensor weight_sum = torch::stable::new_empty(logits, {}, acc_type);
  Tensor loss = per_row ? torch::stable::new_empty(logits, {rows.N}) : torch::stable::new_empty(logits, {});

  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const DeviceRows<T> on_device(rows);
    Acc* m = stats.mutable_data_ptr<Acc>();
    Acc* of_row = losses.mutable_data_ptr<Acc>();
    if (rows.N > 0)
      launch(logits, rows.N, threads_for(rows.C), row_losses<T>, on_device, static_cast<Acc>(label_smoothing), m,
             m + rows.N, of_row);
    launch(logits, 1, threads_for(rows.N), reduce_losses<T>, on_device, of_row, per_row, is_mean(reduction),
           loss.mutable_data_ptr<T>(), weight_sum.mutable_data_ptr<Acc>());
  });
  return {loss, stats, weight_sum};
}

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, std::optional<Tensor> weight, Tensor stats,
                              Tensor weight_sum, int64_t ignore_index, std::string reduction, double label_smoothing) {
  const Rows rows(logits, target, weight, ignore_index);
  const bool per_row = is_per_row(reduction);
  const RowGradients gradients(rows, dloss, stats, weight_sum, per_row);
  Tensor dlogits = torch::stable::new_empty(logits, {rows.N, rows.C});
  if (rows.N == 0 || rows.C == 0) return dlogits;

  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const Acc* m = gradients.stats.template const_data_ptr<Acc>();
    launch(logits, rows.N, threads_for(rows.C), row_gradients<T>, DeviceRows<T>(rows), m, m + rows.N,
           gradients.dlosses.template const_data_ptr<Acc>(), per_row,
           is_mean(reduction) ? gradients.weight_sum.template const_data_ptr<Acc>() : nullptr,
           static_cast<Acc>(label_smoothing), dlogits.mutable_data_ptr<T>());
  });
  return dlogits;
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fused_ops::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&fused_ops::cross_entropy_backward));
}
