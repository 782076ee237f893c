// Cross-entropy. Derivation and names: fused_ops/ops/cross_entropy.py.
//
// A row is read from memory once, to where it is needed again: the shared memory of a block, or of a cluster of them
// (rows.cuh). There its maximum is found, then the sums, then its gradient, which is written once. Sums are taken in a
// fixed order, so a result is the same every time. Nothing is read back to the host: a target out of bounds stops the
// kernel with a device-side assertion.
#include <limits>

#include "cross_entropy.cuh"

namespace fused_ops {
namespace {

// What sums over rows are taken of: read(n) is loaded, and value(read(n)) added.
template <typename V>
struct Values {
  const V* values;

  __device__ V read(int64_t n) const { return values[n]; }
  __device__ double value(V v) const { return v; }
};

// The rows' weights, whose sum the mean divides by.
template <typename T>
struct KeptWeights {
  DeviceRows<T> rows;

  __device__ int64_t read(int64_t n) const { return rows.y ? rows.y[n] : 0; }
  __device__ double value(int64_t y_n) const {
    const int64_t y = rows.y ? rows.checked(y_n) : 0;
    return y >= 0 ? rows.weight(y) : 0;
  }
};

// For each block its share's sum, over `over` where that is not null. Several loads of a thread are under way at once.
template <typename Of, typename Acc, typename Out>
__global__ void FUSED_OPS_ANY_BLOCK sum_up(int64_t N, Of of, const Acc* over, Out* out) {
  constexpr int kAtOnce = 8;
  const int64_t share = ceil_div(N, gridDim.x), end = min(N, (blockIdx.x + 1) * share);
  double sum = 0;
  for (int64_t first = blockIdx.x * share + threadIdx.x; first < end; first += kAtOnce * blockDim.x) {
    decltype(of.read(0)) read[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (const int64_t n = first + u * blockDim.x; n < end) read[u] = of.read(n);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (first + u * blockDim.x < end) sum += of.value(read[u]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<Out>(over ? sum / *over : sum);
}

// The same of all rows, always in the same order: by one block or, of many rows, by several, whose sums one adds up.
template <typename Of, typename Acc>
void sum_rows(const Tensor& on, int64_t N, const Of& of, const Acc* over, Acc* out) {
  constexpr int64_t kRowsOfBlock = 16384, kMostBlocks = 256;
  const int64_t blocks = std::clamp<int64_t>(N / kRowsOfBlock, 1, kMostBlocks);
  if (blocks == 1) return launch(on, {1, threads_for(N)}, sum_up<Of, Acc, Acc>, N, of, over, out);
  Tensor shares = empty_beside(on, {blocks}, ScalarType::Double);
  double* of_share = shares.mutable_data_ptr<double>();
  launch(on, {blocks, kWarp * kMaxWarps}, sum_up<Of, Acc, double>, N, of, nullptr, of_share);
  launch(on, {1, threads_for(blocks)}, sum_up<Values<double>, Acc, Acc>, blocks, Values<double>{of_share}, over, out);
}

// m, log_z and the loss of each row; and dlogits for dloss = 1, where not null. `divisor` is null but for the mean.
template <typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
__global__ void FUSED_OPS_ROW_BLOCK(T)
    row_losses(Deal deal, DeviceRows<T> rows, Cap cap, Targets targets, const Acc* divisor, Acc* m_out, Acc* log_z_out,
               Acc* losses, T* dlogits) {
  Part<T> part(deal, rows.x, rows.N, rows.C);
  const T* const x = part.x;
  const auto t = targets.row(part.start);
  part.keep(deal);

  const Acc least = -std::numeric_limits<Acc>::infinity();
  Acc m = least;
  Largest<T, Part<T>::kPack> of_packs(narrow<T>(least));
  part.for_packs([&](int c, auto size) {
    if constexpr (size() == Part<T>::kPack)
      of_packs.see(part.x, c);
    else
      m = fmax(m, widen(part.x[c]));
  });
  m = fmax(m, of_packs());
  m = cap(part.reduce(m, least, [](Acc a, Acc b) { return fmax(a, b); }));  // NaN is passed over

  Acc of_z[Part<T>::kPack] = {}, of_distance[Part<T>::kPack] = {};
  const Exp<T> exp_of(0);
  part.for_elements([&](int c, int k, Acc x_c) {
    const Acc s = cap(x_c);
    of_z[k] += exp_of(s - m);
    if constexpr (Targets::kDense) of_distance[k] += t(part.first + c, c) * (m - s);
  });
  Acc z = part.sum(of_z), distance = 0;  // Σ exp(s − m), Σ t·(m − s)
  if constexpr (Targets::kDense) distance = part.sum(of_distance);
  const Acc t_sum = sum_targets(part, t);
  if (part.n >= rows.N) return;

  m = isnan(z) && isfinite(m) ? z : m;  // a NaN among the logits
  const Acc log_z = log(z), lse = m + log_z;
  const int64_t y = rows.target(part.n);
  if (part.rank == 0 && part.first == 0) {
    const Acc dense = rows.C ? t_sum * log_z + distance : Acc(0);  // Σ t·(lse − s)
    Acc loss = 0;
    if constexpr (Targets::kProbabilities) {
      loss = dense;
    } else if (y >= 0) {
      loss = rows.weight(y) * (log_z - (cap(widen(x[y])) - m));
      if constexpr (Targets::kDense) loss = (1 - rows.label_smoothing) * loss + rows.label_smoothing / rows.C * dense;
    }
    if (y >= 0 && rows.z_loss != 0) loss += rows.z_loss * lse * lse;
    m_out[part.n] = m;
    log_z_out[part.n] = log_z;
    losses[part.n] = loss;
  }
  if (!dlogits) return;
  const Common<Acc> row(rows, y, t_sum, m, log_z, 1 / (divisor ? *divisor : Acc(1)));
  write_gradients(part, cap, t, row, dlogits, static_cast<T*>(nullptr));
}

// dlogits and dtarget, where not null, from the saved m and log_z. `divisor` is null but for the mean.
template <typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
__global__ void FUSED_OPS_ROW_BLOCK(T)
    row_gradients(Deal deal, DeviceRows<T> rows, Cap cap, Targets targets, const Acc* m, const Acc* log_z,
                  const Acc* dlosses, bool per_row, const Acc* divisor, T* dlogits, T* dtarget) {
  Part<T> part(deal, rows.x, rows.N, rows.C);
  part.first += rows.first;
  const auto t = targets.row(part.start);
  part.keep(deal);
  const Acc t_sum = rows.A ? Acc(0) : sum_targets(part, t);
  if (part.n >= rows.N) return;

  const Acc g = dlosses[per_row ? part.n : 0] / (divisor ? *divisor : Acc(1));
  Common<Acc> row(rows, rows.target(part.n), t_sum, m[part.n], log_z[part.n], g);
  if (rows.A) row.A = rows.A[part.n];
  write_gradients(part, cap, t, row, dlogits, dtarget);
}

template <typename T, typename Acc = accumulate_t<T>>
void launch_gradients(const Rows& rows, const DeviceRows<T>& on_device, const RowGradients& gradients, T* dlogits,
                      T* dtarget) {
  if (rows.C == 0) return;
  const Acc* stats = gradients.stats.const_data_ptr<Acc>();
  dispatch_forms<T>(rows, [&](auto cap, auto targets) {
    launch_rows<T>(rows.logits, rows.R, rows.C, row_gradients<T, decltype(cap), decltype(targets)>, on_device, cap,
                   targets, stats, stats + rows.R, gradients.dlosses.const_data_ptr<Acc>(), rows.per_row,
                   rows.mean ? gradients.divisor.const_data_ptr<Acc>() : nullptr, dlogits, dtarget);
  });
}

// dx times *dloss: where that is 1, as it mostly is, nothing is written. Rows that are ignored stay 0, as no number
// times 0 is NaN, but those that are not finite: then each element looks for its row. Row n, one of D positions of C
// classes, has its elements D apart.
template <typename P, typename T, typename Acc = accumulate_t<T>>
__global__ void FUSED_OPS_ANY_BLOCK scale(T* dx, int64_t packs, int64_t C, int64_t D, const Acc* dloss,
                                          const int64_t* y, int64_t ignore_index) {
  constexpr int kAtOnce = 4;
  const Acc g = *dloss;
  if (g == 1) return;
  const int64_t thread = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, step = int64_t{gridDim.x} * blockDim.x;
  if (!isfinite(g) && y) {
    for (int64_t i = thread; i < packs * P::kSize; i += step)
      dx[i] = y[i / (C * D) * D + i % D] == ignore_index ? T(0) : narrow<T>(widen(dx[i]) * g);
    return;
  }
  for (int64_t first = thread; first < packs; first += kAtOnce * step) {
    P x[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (first + u * step < packs) x[u] = load<P>(dx, (first + u * step) * P::kSize);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + u * step >= packs) break;
#pragma unroll
      for (T& x_k : x[u].values) x_k = narrow<T>(widen(x_k) * g);
      store(dx, (first + u * step) * P::kSize, x[u]);
    }
  }
}

// (N, C, D) as rows of classes, (N·D, C); and back.
Tensor to_rows(const Tensor& t) {
  if (t.dim() != 3) return t;
  return torch::stable::flatten(as_contiguous(torch::stable::transpose(t, 1, 2)), 0, 1);
}

// The inputs of an op as rows.
template <typename... Options>
Rows rows_of(const Tensor& logits, const Tensor& target, const Options&... options) {
  STD_TORCH_CHECK(target.dim() == 1 || target.dim() == logits.dim(),
                  "target should be class indices, (N·D,), or class probabilities, like logits");
  return Rows(to_rows(logits), to_rows(target), options...);
}

Tensor from_rows(const Tensor& rows, const Tensor& logits) {
  if (logits.dim() != 3 || rows.dim() != 2) return rows;
  const Tensor apart = torch::stable::view(rows, {logits.size(0), logits.size(2), logits.size(1)});
  return as_contiguous(torch::stable::transpose(apart, 1, 2));
}

// The loss; what the backward pass needs of it: (m, log_z) and the mean's divisor; and the gradient, where not null.
Tensor loss_of_rows(const Rows& rows, Tensor& stats, Tensor& divisor, Tensor* dlogits) {
  const auto type = rows.logits.scalar_type();
  Tensor losses = empty_beside(rows.logits, {rows.R}, accumulate_type(type));
  Tensor loss = rows.per_row ? losses : empty_beside(rows.logits, {}, accumulate_type(type));
  dispatch_floating(type, "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const DeviceRows<T> on_device(rows);
    Acc *m = stats.mutable_data_ptr<Acc>(), *of_row = losses.mutable_data_ptr<Acc>();
    Acc* kept_weight = divisor.mutable_data_ptr<Acc>();
    const Acc* over = rows.mean ? kept_weight : nullptr;
    sum_rows<KeptWeights<T>, Acc>(rows.logits, rows.R, {on_device}, nullptr, kept_weight);
    dispatch_forms<T>(rows, [&](auto cap, auto targets) {
      launch_rows<T>(rows.logits, rows.R, rows.C, row_losses<T, decltype(cap), decltype(targets)>, on_device, cap,
                     targets, over, m, m + rows.R, of_row, dlogits ? data_or_null<T>(*dlogits) : nullptr);
    });
    if (!rows.per_row) sum_rows<Values<Acc>, Acc>(rows.logits, rows.R, {of_row}, over, loss.mutable_data_ptr<Acc>());
  });
  return loss;
}

Tensor empty_stats(const Rows& rows) {
  return empty_beside(rows.logits, {2, rows.R}, accumulate_type(rows.logits.scalar_type()));
}

Tensor empty_divisor(const Rows& rows) {
  return empty_beside(rows.logits, {}, accumulate_type(rows.logits.scalar_type()));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                         int64_t ignore_index, Name reduction, double label_smoothing,
                                                         double z_loss, std::optional<double> softcap) {
  const Rows rows = rows_of(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  Tensor stats = empty_stats(rows), divisor = empty_divisor(rows);
  return {loss_of_rows(rows, stats, divisor, nullptr), stats, divisor};
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                       int64_t ignore_index, Name reduction, double label_smoothing,
                                                       double z_loss, std::optional<double> softcap, bool narrowed) {
  const Rows rows = rows_of(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  Tensor stats = empty_stats(rows), divisor = empty_divisor(rows), dlogits = gradient_or_nothing(rows, true);
  const Tensor loss = loss_of_rows(rows, stats, divisor, &dlogits);
  return {narrowed ? as_type(loss, logits.scalar_type()) : loss, from_rows(dlogits, logits)};
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
      constexpr int kPack = 16 / sizeof(T);
      T* dx = dlogits.mutable_data_ptr<T>();
      const auto run = [&](auto pack) {
        using P = decltype(pack);
        const int64_t packs = size / P::kSize, blocks = std::min<int64_t>(packs / 1024 + 1, 4096);
        launch(dlogits, {blocks, 256}, scale<P, T>, dx, packs, rows.C, rows.D, factor.const_data_ptr<accumulate_t<T>>(),
               rows.probabilities ? nullptr : rows.target.const_data_ptr<int64_t>(), ignore_index);
      };
      const bool in_packs = size % kPack == 0 && reinterpret_cast<uintptr_t>(dx) % 16 == 0;
      in_packs ? run(Pack<T, kPack>{}) : run(Pack<T, 1>{});
    });
}

std::tuple<Tensor, Tensor> cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target,
                                                  std::optional<Tensor> weight, Tensor stats, Tensor divisor,
                                                  int64_t ignore_index, Name reduction, double label_smoothing,
                                                  double z_loss, std::optional<double> softcap, bool needs_logits,
                                                  bool needs_target) {
  const Rows rows = rows_of(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  const RowGradients gradients(rows, dloss, stats, divisor);
  Tensor dlogits = gradient_or_nothing(rows, needs_logits);
  Tensor dtarget = gradient_or_nothing(rows, needs_target && rows.probabilities);
  if (dlogits.numel() || dtarget.numel())
    dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
      using T = decltype(scalar);
      launch_gradients<T>(rows, DeviceRows<T>(rows), gradients, data_or_null<T>(dlogits), data_or_null<T>(dtarget));
    });
  return {from_rows(dlogits, logits), from_rows(dtarget, logits)};
}

Tensor cross_entropy_backward_(Tensor dloss, Tensor logits, Tensor target, std::optional<Tensor> weight, Tensor stats,
                               Tensor divisor, int64_t ignore_index, Name reduction, double label_smoothing,
                               double z_loss, std::optional<double> softcap, bool needs_target) {
  STD_TORCH_CHECK(logits.is_contiguous(), "logits should be contiguous, to be written over");
  const Rows rows = rows_of(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  const RowGradients gradients(rows, dloss, stats, divisor);
  Tensor dlogits = rows.logits;  // the logits themselves, but for those of positions
  Tensor dtarget = gradient_or_nothing(rows, needs_target && rows.probabilities);
  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    launch_gradients<T>(rows, DeviceRows<T>(rows), gradients, dlogits.mutable_data_ptr<T>(), data_or_null<T>(dtarget));
  });
  if (logits.dim() == 3) torch::stable::copy_(logits, from_rows(dlogits, logits));
  return from_rows(dtarget, logits);
}

void cross_entropy_slice_backward_(Tensor dloss, Tensor logits, Tensor target, std::optional<Tensor> weight,
                                   Tensor stats, Tensor A, int64_t first, int64_t classes, int64_t ignore_index,
                                   double label_smoothing, std::optional<double> softcap) {
  STD_TORCH_CHECK(logits.is_contiguous() && logits.dim() == 2, "logits should be contiguous rows, to be written over");
  STD_TORCH_CHECK(0 <= first && first + logits.size(1) <= classes, "the slice should be one of the classes");
  Rows rows(logits, target, std::nullopt, ignore_index, "none", label_smoothing, 0, softcap);
  STD_TORCH_CHECK(!rows.probabilities, "target should be class indices");
  rows.weight = accumulated_vector(weight, classes, logits, "weight");
  const RowGradients gradients(rows, dloss, stats, empty_divisor(rows));  // nothing is divided
  const Tensor of_rows = as_contiguous(A);
  check_vector(of_rows, rows.R, accumulate_type(logits.scalar_type()), "A");
  check_same_device(of_rows, logits, "A");
  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    DeviceRows<T> on_device(rows);
    on_device.first = first;
    on_device.classes = classes;
    on_device.A = of_rows.const_data_ptr<accumulate_t<T>>();
    launch_gradients<T>(rows, on_device, gradients, logits.mutable_data_ptr<T>(), nullptr);
  });
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fused_ops::cross_entropy_forward));
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&fused_ops::cross_entropy_with_gradient));
  m.impl("cross_entropy_scale_", TORCH_BOX(&fused_ops::cross_entropy_scale_));
  m.impl("cross_entropy_backward", TORCH_BOX(&fused_ops::cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&fused_ops::cross_entropy_backward_));
  m.impl("cross_entropy_slice_backward_", TORCH_BOX(&fused_ops::cross_entropy_slice_backward_));
}
