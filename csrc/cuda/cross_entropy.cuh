// What a thread of cross-entropy does with its part of a row. Derivation and names: fused_ops/ops/cross_entropy.py.
#pragma once

#include <cassert>
#include <cstdio>

#include "../cross_entropy.h"
#include "rows.cuh"

namespace fused_ops {

// The rows as a kernel sees them.
template <typename T, typename Acc = accumulate_t<T>>
struct DeviceRows {
  const T* x;
  const Acc* w;      // or null
  const int64_t* y;  // null for class probabilities
  int64_t N, C, ignore_index;
  Acc label_smoothing, z_loss;
  // Where x has a slice of the classes: the first, how many there are in all, and A of each row, which takes all.
  int64_t first = 0, classes = C;
  const Acc* A = nullptr;

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
  __device__ int64_t target(int64_t n) const { return y ? checked(y[n]) : 0; }
  __device__ int64_t checked(int64_t y_n) const {
    if (y_n == ignore_index) return -1;
    const bool in_bounds = y_n >= 0 && y_n < classes;
    if (!in_bounds) printf("Target %lld is out of bounds.\n", static_cast<long long>(y_n));
    assert(in_bounds);
    return in_bounds ? y_n : -1;
  }

  // What the row weighs in the mean.
  __device__ Acc weight(int64_t target) const { return y && w ? w[target] : Acc(1); }
};

// exp(x − y) for the logits of type T. Of 16 bits there are so many a second that a kernel would wait for expf, not for
// memory: there it is the card's own 2^x, of a product that is rounded before, with a relative error about
// 2^-24·(|x| + |y|).
template <typename T, typename Acc = accumulate_t<T>>
struct Exp {
  static constexpr bool kOfPowers = sizeof(T) == 2;
  static constexpr Acc kInverseLn2 = Exponents<Acc>::kInverseLn2;
  Acc y;  // of powers: y/ln 2

  __device__ explicit Exp(Acc y) : y(kOfPowers ? y * kInverseLn2 : y) {}

  __device__ Acc operator()(Acc x) const {
    if constexpr (kOfPowers) {
      float power = fma(x, kInverseLn2, -y);
#ifdef __CUDACC__
      asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(power));
#else  // in the emulation
      power = std::exp2(power);
#endif
      return power;
    } else {
      return exp(x - y);
    }
  }
};

// Σ t, without what the target alone has; 0 for class indices without smoothing. Both passes add it up here: so the
// same gradient comes from each.
template <typename T, typename Targets, typename Acc = accumulate_t<T>>
__device__ Acc sum_targets(const Part<T>& part, const Targets& t) {
  if constexpr (Targets::kDense) {
    Acc sum[Part<T>::kPack] = {};
    part.for_elements([&](int c, int k, Acc) { sum[k] += t(part.first + c, c); });
    return part.sum(sum);
  } else {
    return 0;
  }
}

// What the gradients of a row's elements have in common.
template <typename Acc>
struct Common {
  int64_t y;       // the target, negative in a row that is ignored
  Acc m, log_z;    // lse = m + log_z
  Acc g, A;        // of dx_c = g·(A·p_c − t_c)·k_c
  Acc nll, share;  // what t has at the target alone; what w_c is multiplied by elsewhere, with smoothing

  // `t_sum` is sum_targets, which with smoothing is Σ w.
  template <typename T>
  __device__ Common(const DeviceRows<T>& rows, int64_t y, Acc t_sum, Acc m, Acc log_z, Acc g)
      : y(y), m(m), log_z(log_z), g(g), share(rows.label_smoothing / rows.classes) {
    nll = rows.y && y >= 0 ? (1 - rows.label_smoothing) * rows.weight(y) : Acc(0);
    A = nll + (rows.y ? share * t_sum : t_sum) + 2 * rows.z_loss * (m + log_z);
  }
};

// dx_c = g·(A·p_c − t_c)·k_c and dy_c = g·dt/dy·(lse − s_c), where not null; 0 in a row that is ignored. dx may lie
// where x does: a thread reads an element before it writes it, and nobody else reads it.
template <typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
__device__ void write_gradients(const Part<T>& part, const Cap& cap, const Targets& t, const Common<Acc>& row,
                                T* dlogits, T* dtarget) {
  T *dx_row = dlogits ? dlogits + part.start : nullptr, *dy_row = dtarget ? dtarget + part.start : nullptr;
  if (row.y < 0) return part.for_packs([&](int c, auto size) { store(dx_row, c, Pack<T, size()>{}); }, dx_row);
  const T* y_row = nullptr;
  if constexpr (Targets::kProbabilities) y_row = t.y;
  const Exp<T> softmax(row.log_z);  // of s − m
  const Acc gA = row.g * row.A;
  const int64_t until_y = row.y - part.first;
  const int c_of_y = 0 <= until_y && until_y < part.count ? static_cast<int>(until_y) : -1;
  part.for_packs(
      [&](int c, auto size) {
        using P = Pack<T, size()>;
        const auto x = widen(load<P>(part.x, c));
        P dx, y, dy;
        [[maybe_unused]] Targets t_of_pack = t;
        if constexpr (Targets::kProbabilities) {
          y = load<P>(y_row, c);
          t_of_pack.y = y.values;
        }
        const auto t_but_nll = [&](int k) {  // what t has at the k-th class, without what the target alone has
          const Acc t_k = t_of_pack(part.first + c + k, k);
          return Targets::kProbabilities ? t_k : row.share * t_k;
        };
#pragma unroll
        for (int k = 0; k < P::kSize; ++k) {
          const Acc s = cap(x.values[k]), p = softmax(s - row.m);
          dx.values[k] = narrow<T>((Targets::kDense ? row.g * (row.A * p - t_but_nll(k)) : gA * p) * cap.slope(s));
          if constexpr (Targets::kProbabilities)
            dy.values[k] = narrow<T>(row.g * t.slope(part.first + c + k) * (row.log_z - (s - row.m)));
        }
        if (!Targets::kProbabilities && static_cast<unsigned>(c_of_y - c) < P::kSize) {  // in one pack of a row
#pragma unroll
          for (int k = 0; k < P::kSize; ++k) {
            const Acc s = cap(x.values[k]), p = softmax(s - row.m);
            const Acc t_k = row.nll + t_but_nll(k);
            if (c + k == c_of_y) dx.values[k] = narrow<T>(row.g * (row.A * p - t_k) * cap.slope(s));
          }
        }
        if (dx_row) store(dx_row, c, dx);
        if (dy_row) store(dy_row, c, dy);
      },
      dx_row, dy_row, y_row);
}

}  // namespace fused_ops
