// Cross-entropy: what its kernels have in common on every device. Derivation and names: fused_ops/ops/cross_entropy.py.
#pragma once

#include <algorithm>

#include "checks.h"

namespace fused_ops {

// The inputs of a kernel, checked and contiguous; the class weights in the accumulate type.
struct Rows {
  Tensor logits, target;
  std::optional<Tensor> weight;
  int64_t N, C, ignore_index;
  bool probabilities, per_row, mean;  // the targets are class probabilities; reduction is "none"; "mean"
  double label_smoothing, z_loss;
  std::optional<double> softcap;

  Rows(const Tensor& logits_, const Tensor& target_, const std::optional<Tensor>& weight_, int64_t ignore_index_,
       const std::string& reduction, double label_smoothing_, double z_loss_, std::optional<double> softcap_)
      : logits(torch::stable::contiguous(logits_)),
        target(torch::stable::contiguous(target_)),
        ignore_index(ignore_index_),
        probabilities(target_.scalar_type() != ScalarType::Long),
        per_row(reduction == "none"),
        mean(reduction == "mean"),
        label_smoothing(label_smoothing_),
        z_loss(z_loss_),
        softcap(softcap_) {
    STD_TORCH_CHECK(logits.dim() == 2, "logits should be (N, C)");
    N = logits.size(0);
    C = logits.size(1);
    if (probabilities) {
      STD_TORCH_CHECK(target.dim() == 2 && target.size(0) == N && target.size(1) == C &&
                          target.scalar_type() == logits.scalar_type(),
                      "target should be class indices, (N,), or class probabilities, (N, C), in the logits' dtype");
    } else {
      check_vector(target, N, ScalarType::Long, "target");
    }
    check_same_device(target, logits, "target");
    if (weight_) {
      const auto type = accumulate_type(logits.scalar_type());
      weight = torch::stable::contiguous(torch::stable::to(*weight_, type));
      check_vector(*weight, C, type, "weight");
      check_same_device(*weight, logits, "weight");
    }
  }
};

// What comes back to the loss, and what its forward pass saved.
struct RowGradients {
  Tensor dlosses, stats, divisor;

  RowGradients(const Rows& rows, const Tensor& dloss, const Tensor& stats_, const Tensor& divisor_)
      : dlosses(torch::stable::contiguous(torch::stable::to(dloss, accumulate_type(rows.logits.scalar_type())))),
        stats(torch::stable::contiguous(stats_)),
        divisor(divisor_) {
    const auto type = accumulate_type(rows.logits.scalar_type());
    STD_TORCH_CHECK(dlosses.numel() == (rows.per_row ? rows.N : 1), "dloss should have an element for each loss");
    STD_TORCH_CHECK(stats.numel() == 2 * rows.N && stats.scalar_type() == type, "stats should be (2, N)");
    STD_TORCH_CHECK(divisor.numel() == 1 && divisor.scalar_type() == type, "divisor should be a scalar");
    check_same_device(dlosses, rows.logits, "dloss");
    check_same_device(stats, rows.logits, "stats");
    check_same_device(divisor, rows.logits, "divisor");
  }
};

// Room for a gradient of the rows, or (0,) where none is needed.
inline Tensor gradient_or_nothing(const Rows& rows, bool needed) {
  return needed ? torch::stable::new_empty(rows.logits, {rows.N, rows.C}) : torch::stable::new_empty(rows.logits, {0});
}

// Its elements, or null where it has none.
template <typename T>
T* data_or_null(Tensor& gradient) {
  return gradient.numel() ? gradient.mutable_data_ptr<T>() : nullptr;
}

// s = cap·tanh(x/cap) and k = ds/dx = 1 − (s/cap)², or s = x and k = 1.
template <typename Acc, bool kCapped>
struct Softcap {
  Acc cap, inverse;

  explicit Softcap(const std::optional<double>& softcap)
      : cap(static_cast<Acc>(softcap.value_or(1))), inverse(static_cast<Acc>(1 / softcap.value_or(1))) {}

  FUSED_OPS_HOST_DEVICE Acc operator()(Acc x) const { return kCapped ? cap * tanh(x * inverse) : x; }
  FUSED_OPS_HOST_DEVICE Acc slope(Acc s) const { return kCapped ? 1 - (s * inverse) * (s * inverse) : Acc(1); }
};

// The target weights t_c of a row, in three forms; only class probabilities also have a gradient.
struct OneHot {  // t_c = 0, but for what the target itself has on top: that is the caller's
  static constexpr bool kDense = false, kProbabilities = false;

  FUSED_OPS_HOST_DEVICE OneHot row(int64_t) const { return *this; }
  FUSED_OPS_HOST_DEVICE int operator()(int64_t) const { return 0; }
};

template <typename Acc>
struct Smoothed {  // t_c = w_c: the caller multiplies by ε/C, and adds what the target itself has on top
  static constexpr bool kDense = true, kProbabilities = false;
  const Acc* w;  // or null

  FUSED_OPS_HOST_DEVICE Smoothed row(int64_t) const { return *this; }
  FUSED_OPS_HOST_DEVICE Acc operator()(int64_t c) const { return w ? w[c] : Acc(1); }
};

template <typename T, typename Acc = accumulate_t<T>>
struct Probabilities {  // t_c = w_c·((1−ε)·y_c + ε/C)
  static constexpr bool kDense = true, kProbabilities = true;
  const T* y;
  const Acc* w;  // or null
  Acc keep, share;

  FUSED_OPS_HOST_DEVICE Probabilities row(int64_t start) const { return {y + start, w, keep, share}; }
  FUSED_OPS_HOST_DEVICE Acc slope(int64_t c) const { return w ? keep * w[c] : keep; }  // dt/dy
  FUSED_OPS_HOST_DEVICE Acc operator()(int64_t c) const {
    const Acc t = keep * widen(y[c]) + share;
    return w ? w[c] * t : t;
  }
};

// Calls f(softcap, targets) with the forms above that the rows have.
template <typename T, typename F>
void dispatch_forms(const Rows& rows, const F& f) {
  using Acc = accumulate_t<T>;
  const Acc* w = data_or_null<Acc>(rows.weight);
  const auto with_targets = [&](auto softcap) {
    if (rows.probabilities)
      f(softcap,
        Probabilities<T>{rows.target.template const_data_ptr<T>(), w, static_cast<Acc>(1 - rows.label_smoothing),
                         static_cast<Acc>(rows.label_smoothing / std::max<int64_t>(1, rows.C))});
    else if (rows.label_smoothing > 0)
      f(softcap, Smoothed<Acc>{w});
    else
      f(softcap, OneHot{});
  };
  if (rows.softcap)
    with_targets(Softcap<Acc, true>(rows.softcap));
  else
    with_targets(Softcap<Acc, false>(rows.softcap));
}

}  // namespace fused_ops
