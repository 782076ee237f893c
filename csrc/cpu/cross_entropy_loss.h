// The losses and gradients of rows, a block at a time. Derivation and names: fused_ops/ops/cross_entropy.py.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>

#include "cross_entropy_jobs.h"

namespace fused_ops {

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

  bool ignored(int64_t r) const { return y && y[r] == ignore_index; }
  Acc weight(int64_t r) const { return y && w ? w[y[r]] : Acc(1); }
};

// Logits, class probabilities and their gradients from some element on; null where there are none.
template <typename T>
struct Elements {
  const T *x, *y;
  T *dx, *dy;

  Elements from(int64_t i) const { return {x + i, y ? y + i : nullptr, dx ? dx + i : nullptr, dy ? dy + i : nullptr}; }
};

// Of each row of a block: m and log_z, the gradient g of its loss, and Σ t.
template <typename Acc>
struct RowValues {
  Lanes<Acc> m, log_z, g, t_sum;
};

// The losses and gradients of a block, in one of the forms of the targets.
template <typename T, typename Cap, typename Targets>
struct BlockLoss {
  using Acc = accumulate_t<T>;
  Cap cap;
  Targets targets;
  Classes<Acc> classes;
  Acc keep, share, z_loss, w_sum = 0;  // 1 − ε, ε/C, ζ; Σ w, of smoothed class indices

  BlockLoss(const Rows& rows, Cap cap_, Targets targets_)
      : cap(cap_),
        targets(targets_),
        classes(rows),
        keep(static_cast<Acc>(1 - rows.label_smoothing)),
        share(static_cast<Acc>(rows.label_smoothing / std::max<int64_t>(1, rows.C))),
        z_loss(static_cast<Acc>(rows.z_loss)) {
    if constexpr (Targets::kDense && !Targets::kProbabilities)
      for (int64_t c = 0; c < rows.C; ++c) w_sum += targets(c, c);
  }

  Targets targets_of(const Elements<T>& at) const {
    Targets t = targets;
    if constexpr (Targets::kProbabilities) t.y = at.y;
    return t;
  }

  // From the gradient of each loss, which is in `row`, dx, unless it is null: the losses of rows from r on. The others
  // of `row` it finds.
  template <typename B>
  void forward(const B& block, int64_t r, const Elements<T>& at, RowValues<Acc>& row, Acc* buffer, Acc* losses) const {
    Lanes<Acc> z, distance;
    sweep<true>(block, FindMaxima<T, Cap>{{at.x, cap}, row.m});
    if (at.dx)
      exponentiate<true>(block, at, targets_of(at), row.m, buffer, z, distance);
    else
      exponentiate<false>(block, at, targets_of(at), row.m, buffer, z, distance);
    finish_losses(block, r, at, row, z, distance, losses);
    if (at.dx) logits_gradient(block, r, at, Exponentials<Acc>{buffer}, row);
  }

  // The forward pass, with their gradients, of the blocks that `take` returns the first rows of: a sweep for each.
  // While the processor has the exponentials to work out, memory takes the gradient of the block before and brings the
  // block after, whose maxima are found. Only where a gradient is the same to the last bit in every sweep: that is, has
  // one product.
  static constexpr bool kInOneSweep = !Targets::kDense && !Cap::kCapped;

  template <typename Take>
  void forward_in_one_sweep(const Block<false>& block, Take take, const Elements<T>& all, Acc g, Acc* buffer,
                            Acc* losses) const {
    Acc *e = buffer, *e_before = buffer + block.first_step(block.rows);
    RowValues<Acc> row;
    Factors<Acc> factors;
    Lanes<Acc> z, distance, next_m;
    std::fill_n(row.g, block.rows, g);
    const auto from = [&](int64_t r) { return all.from(block.start(r)); };
    const auto maxima = [&](int64_t r) { return FindMaxima<T, Cap>{{from(r).x, cap}, next_m}; };
    const auto gradient = [&](int64_t r) {
      return WriteGradient<T, Cap, Exponentials<Acc>, Targets>{
          {from(r).x, cap}, {e_before}, targets, factors, from(r).dx};
    };
    std::optional<int64_t> before, r = take();
    if (!r) return;
    sweep<true>(block, maxima(*r));
    while (r) {
      std::copy_n(next_m, block.rows, row.m);
      const Exponentiate<true, T, Cap, Targets> exponentiate{{from(*r).x, cap}, targets, row.m, e, z, distance};
      const std::optional<int64_t> next = take();
      const FindMaxima<T, Cap> find_maxima = maxima(next.value_or(*r));  // after the last one they are not used
      if (before) {
        sweep<true>(block, gradient(*before), exponentiate, find_maxima);
        clear_ignored(block, *before, from(*before));
      } else {
        sweep<true>(block, exponentiate, find_maxima);
      }
      finish_losses(block, *r, from(*r), row, z, distance, losses + *r);
      find_factors(block, *r, row, factors);
      std::swap(e, e_before);
      before = std::exchange(r, next);
    }
    sweep<true>(block, gradient(*before));
    clear_ignored(block, *before, from(*before));
  }

  // From the sums of a block's rows, their losses.
  template <typename B>
  void finish_losses(const B& block, int64_t r, const Elements<T>& at, RowValues<Acc>& row, const Lanes<Acc>& z,
                     const Lanes<Acc>& distance, Acc* losses) const {
    if constexpr (Targets::kProbabilities) sweep<true>(block, SumTargets<Targets, Acc>{targets_of(at), row.t_sum});
    logarithms(block, z, row.log_z);
    for (int64_t i = 0; i < block.rows; ++i) {
      Acc &m = row.m[i], &loss = losses[i];
      const Acc log_z = row.log_z[i];
      loss = 0;
      if constexpr (Targets::kProbabilities)
        loss = block.C ? row.t_sum[i] * log_z + distance[i] : Acc(0);
      else if (!classes.ignored(r + i)) {
        const Acc s_y = cap(widen(at.x[block.place(i, classes.y[r + i])]));
        loss = keep * classes.weight(r + i) * (log_z - (s_y - m));
        if constexpr (Targets::kDense) loss += share * (w_sum * log_z + distance[i]);
      }
      if (std::isnan(z[i]) && std::isfinite(m)) m = z[i];  // a NaN among the logits
      if (z_loss != 0 && !classes.ignored(r + i)) loss += z_loss * (m + log_z) * (m + log_z);
    }
  }

  // What the rows of a block have for their gradient.
  template <typename B>
  void find_factors(const B& block, int64_t r, const RowValues<Acc>& row, Factors<Acc>& factors) const {
    inverse_sums(block, row.log_z, factors.a);
    for (int64_t i = 0; i < block.rows; ++i) {
      const Acc g = row.g[i];
      Acc A = 2 * z_loss * (row.m[i] + row.log_z[i]);
      if constexpr (Targets::kProbabilities) {
        A += row.t_sum[i];
        factors.g_t[i] = g;
      } else {
        const Acc nll_t = classes.ignored(r + i) ? Acc(0) : keep * classes.weight(r + i);  // what t has at y alone
        A += nll_t + share * w_sum;
        factors.g_t[i] = g * share;
        factors.g_y[i] = usual_nan(g * nll_t);
        factors.y[i] = classes.ignored(r + i) ? 0 : static_cast<int32_t>(classes.y[r + i]);
      }
      factors.a[i] = usual_nan(factors.a[i] * (g * A));
    }
  }

  // dx of the rows that are ignored is 0, whatever their logits are.
  template <typename B>
  void clear_ignored(const B& block, int64_t r, const Elements<T>& at) const {
    for (int64_t i = 0; i < block.rows; ++i)
      for (int64_t c = 0; classes.ignored(r + i) && c < block.C; ++c) at.dx[block.place(i, c)] = T(0);
  }

  // The gradients of rows from r on, where not null, from what is in `row`.
  template <typename B>
  void backward(const B& block, int64_t r, const Elements<T>& at, RowValues<Acc>& row, Acc* buffer) const {
    if constexpr (Targets::kProbabilities) {
      const auto t = targets_of(at);
      sweep<true>(block, SumTargets<Targets, Acc>{t, row.t_sum});
      if (at.dy)
        sweep<false>(block, WriteTargetGradient<T, Cap, Targets>{{at.x, cap}, t, row.m, row.log_z, row.g, at.dy});
    }
    if (!at.dx) return;
    // As forward did, where compilers choose which product is rounded: of a·e − g_t·t one, of m − cap·tanh one or none.
    if constexpr (Targets::kDense || Cap::kCapped) {
      Lanes<Acc> z, distance;  // known already
      exponentiate<true>(block, at, OneHot{}, row.m, buffer, z, distance);
      logits_gradient(block, r, at, Exponentials<Acc>{buffer}, row);
    } else {
      logits_gradient(block, r, at, ExponentialsAgain<T>{row.m}, row);
    }
  }

 private:
  template <bool kKept, typename B, typename SomeTargets>
  void exponentiate(const B& block, const Elements<T>& at, SomeTargets t, const Lanes<Acc>& m, Acc* e, Lanes<Acc>& z,
                    Lanes<Acc>& distance) const {
    const T* next = at.x + (B::kSideBySide ? kLanes : block.rows * block.C);  // harmless after the last block
    sweep<true>(block, Prefetch<T>{next}, Exponentiate<kKept, T, Cap, SomeTargets>{{at.x, cap}, t, m, e, z, distance});
  }

  // dx of the rows from r on, from e = exp(s_c − m).
  template <typename B, typename E>
  void logits_gradient(const B& block, int64_t r, const Elements<T>& at, E e, const RowValues<Acc>& row) const {
    Factors<Acc> factors;
    find_factors(block, r, row, factors);
    sweep<false>(block, WriteGradient<T, Cap, E, Targets>{{at.x, cap}, e, targets_of(at), factors, at.dx});
    clear_ignored(block, r, at);
  }
};

}  // namespace fused_ops
