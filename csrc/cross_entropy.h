// Cross-entropy: what its kernels have in common on every device. Derivation and names: fused_ops/ops/cross_entropy.py.
#pragma once

#include <algorithm>

#include "checks.h"
#include "empty.h"
#include "name.h"

namespace fused_ops {

// The inputs of a kernel, checked and contiguous; the class weights in the accumulate type. The logits are (N, C), or
// (N, C, D) with D positions an example: R = N·D rows of classes, whose elements are D apart.
struct Rows {
  Tensor logits, target;
  std::optional<Tensor> weight;
  int64_t N, C, D, R, ignore_index;
  bool probabilities, per_row, mean;  // the targets are class probabilities; reduction is "none"; "mean"
  double label_smoothing, z_loss;
  std::optional<double> softcap;

  Rows(const Tensor& logits_, const Tensor& target_, const std::optional<Tensor>& weight_, int64_t ignore_index_,
       const Name& reduction, double label_smoothing_, double z_loss_, std::optional<double> softcap_)
      : logits(as_contiguous(logits_)),
        target(as_contiguous(target_)),
        ignore_index(ignore_index_),
        probabilities(target_.scalar_type() != ScalarType::Long),
        per_row(reduction == "none"),
        mean(reduction == "mean"),
        label_smoothing(label_smoothing_),
        z_loss(z_loss_),
        softcap(softcap_) {
    const int64_t dim = logits.dim();
    STD_TORCH_CHECK(dim == 2 || dim == 3, "logits should be (N, C) or (N, C, D)");
    N = logits.size(0);
    C = logits.size(1);
    D = dim == 3 ? logits.size(2) : 1;
    R = N * D;
    if (probabilities) {
      STD_TORCH_CHECK(target.dim() == dim && target.size(0) == N && target.size(1) == C &&
                          (dim == 2 || target.size(2) == D) && target.scalar_type() == logits.scalar_type(),
                      "target should be class indices, (N·D,), or class probabilities, like logits");
    } else {
      check_vector(target, R, ScalarType::Long, "target");
    }
    check_same_device(target, logits, "target");
    weight = accumulated_vector(weight_, C, logits, "weight");
  }

  // Where row r starts in memory.
  int64_t start(int64_t r) const { return r / D * D * C + r % D; }
};

// What comes back to the loss, and what its forward pass saved.
struct RowGradients {
  Tensor dlosses, stats, divisor;

  RowGradients(const Rows& rows, const Tensor& dloss, const Tensor& stats_, const Tensor& divisor_)
      : dlosses(as_contiguous(as_type(dloss, accumulate_type(rows.logits.scalar_type())))),
        stats(as_contiguous(stats_)),
        divisor(divisor_) {
    const auto type = accumulate_type(rows.logits.scalar_type());
    STD_TORCH_CHECK(dlosses.numel() == (rows.per_row ? rows.R : 1), "dloss should have an element for each loss");
    STD_TORCH_CHECK(stats.numel() == 2 * rows.R && stats.scalar_type() == type, "stats should be (2, N·D)");
    STD_TORCH_CHECK(divisor.numel() == 1 && divisor.scalar_type() == type, "divisor should be a scalar");
    check_same_device(dlosses, rows.logits, "dloss");
    check_same_device(stats, rows.logits, "stats");
    check_same_device(divisor, rows.logits, "divisor");
  }
};

// Room for a gradient like the logits, or (0,) where none is needed.
inline Tensor gradient_or_nothing(const Rows& rows, bool needed) {
  const auto type = rows.logits.scalar_type();
  if (!needed) return empty_beside(rows.logits, {0}, type);
  if (rows.logits.dim() == 2) return empty_beside(rows.logits, {rows.N, rows.C}, type);
  return empty_beside(rows.logits, {rows.N, rows.C, rows.D}, type);
}

// Its elements, or null where it has none.
template <typename T>
T* data_or_null(Tensor& gradient) {
  return gradient.numel() ? gradient.mutable_data_ptr<T>() : nullptr;
}

// s = cap·tanh(x/cap) and k = ds/dx = 1 − (s/cap)², or s = x and k = 1.
template <typename Acc, bool kCapped_>
struct Softcap {
  static constexpr bool kCapped = kCapped_;
  Acc cap, inverse;

  explicit Softcap(const std::optional<double>& softcap)
      : cap(static_cast<Acc>(softcap.value_or(1))), inverse(static_cast<Acc>(1 / softcap.value_or(1))) {}

  FUSED_OPS_HOST_DEVICE Acc operator()(Acc x) const { return kCapped ? cap * tanh(x * inverse) : x; }
  FUSED_OPS_HOST_DEVICE Acc slope(Acc s) const { return kCapped ? 1 - (s * inverse) * (s * inverse) : Acc(1); }
};

// The target weights t_c of a row, in three forms; only class probabilities are elements in memory, of which the i-th
// is that of class c, and have a gradient. of_class(c): for a loop over rows, where not each should ask for its weight.
struct OneHot {  // t_c = 0, but for what the target itself has on top: that is the caller's
  static constexpr bool kDense = false, kProbabilities = false;

  FUSED_OPS_HOST_DEVICE OneHot row(int64_t) const { return *this; }
  OneHot of_class(int64_t) const { return *this; }
  FUSED_OPS_HOST_DEVICE int operator()(int64_t, int64_t) const { return 0; }
};

template <typename Acc>
struct Smoothed {  // t_c = w_c: the caller multiplies by ε/C, and adds what the target itself has on top
  static constexpr bool kDense = true, kProbabilities = false;
  const Acc* w;  // or null

  struct OfClass {
    Acc w_c;
    Acc operator()(int64_t, int64_t) const { return w_c; }
  };

  FUSED_OPS_HOST_DEVICE Smoothed row(int64_t) const { return *this; }
  OfClass of_class(int64_t c) const { return {w ? w[c] : Acc(1)}; }
  FUSED_OPS_HOST_DEVICE Acc operator()(int64_t c, int64_t) const { return w ? w[c] : Acc(1); }
};

template <typename T, typename Acc = accumulate_t<T>>
struct Probabilities {  // t_c = w_c·((1−ε)·y_c + ε/C)
  static constexpr bool kDense = true, kProbabilities = true;
  const T* y;
  const Acc* w;  // or null
  Acc keep, share;

  struct OfClass {
    const T* y;
    Acc w_c, keep, share;
    Acc slope(int64_t) const { return keep * w_c; }
    Acc operator()(int64_t, int64_t i) const { return w_c * (keep * widen(y[i]) + share); }
  };

  FUSED_OPS_HOST_DEVICE Probabilities row(int64_t start) const { return {y + start, w, keep, share}; }
  OfClass of_class(int64_t c) const { return {y, w ? w[c] : Acc(1), keep, share}; }
  FUSED_OPS_HOST_DEVICE Acc slope(int64_t c) const { return w ? keep * w[c] : keep; }  // dt/dy
  FUSED_OPS_HOST_DEVICE Acc operator()(int64_t c, int64_t i) const {
    const Acc t = keep * widen(y[i]) + share;
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
