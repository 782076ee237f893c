// The loops of cross-entropy over the elements of a block: one long row of classes, or many rows side by side.
// Derivation and names: fused_ops/ops/cross_entropy.py.
//
// Both are steps of kLanes elements. One row is spread over the lanes, which are merged in the end. Rows side by side
// have a lane each, and their step k is the class k. So one set of loops serves logits of every shape, and every loop
// runs at the full width of the processor.
#pragma once

#include <algorithm>
#include <limits>

#include "../cross_entropy.h"
#include "vectorize.h"

namespace fused_ops {

constexpr int64_t kLanes = 64;

// A value for each lane.
template <typename Acc>
using Lanes = Acc[kLanes];

template <bool kSideBySide_>
struct Block {
  static constexpr bool kSideBySide = kSideBySide_;
  int64_t C, rows, D;  // D is how far apart the classes of a row lie

  int64_t steps() const { return kSideBySide ? C : ceil_div(C, kLanes); }
  int64_t step() const { return kSideBySide ? D : kLanes; }
  int64_t lanes(int64_t k) const { return kSideBySide ? rows : std::min(kLanes, C - k * kLanes); }
  int64_t class_of(int64_t k, int64_t p) const { return kSideBySide ? k : k * kLanes + p; }
  int64_t place(int64_t row, int64_t c) const { return kSideBySide ? c * D + row : c; }  // in memory

  // The sum of a row that is spread over the lanes, by halves, in lane 0.
  template <typename Acc>
  void merge(Lanes<Acc>& sums) const {
    if constexpr (!kSideBySide)
      for (int64_t half = kLanes / 2; half > 0; half /= 2)
#pragma omp simd
        for (int64_t p = 0; p < half; ++p) sums[p] += sums[p + half];
  }

  // What the row in lane 0 has, in every lane that it is spread over.
  template <typename Acc>
  void share(Lanes<Acc>& values) const {
    if constexpr (!kSideBySide) std::fill(values + 1, values + kLanes, values[0]);
  }
};

// f(p) for every lane, mostly a constant number.
template <typename F>
inline void for_lanes(int64_t lanes, const F& f) {
  if (lanes == kLanes) {
#pragma omp simd
    for (int64_t p = 0; p < kLanes; ++p) f(p);
  } else {
#pragma omp simd
    for (int64_t p = 0; p < lanes; ++p) f(p);
  }
}

template <typename Acc>
inline Acc larger(Acc a, Acc b) {
  return a < b ? b : a;  // passes over a NaN in b
}

// s_c of every row, in steps, and m = max s of every row. What a step has no element for is −inf.
template <typename T, typename B, typename Cap, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void widen_block(const T* x, B block, Cap cap, Acc* s, Lanes<Acc>& m) {
  constexpr Acc least = -std::numeric_limits<Acc>::infinity();
  if constexpr (B::kSideBySide) {
    std::fill(m, m + kLanes, least);
    for (int64_t k = 0; k < block.C; ++k, x += block.D, s += kLanes) {
      for_lanes(block.rows, [&](int64_t p) {
        const Acc s_c = cap(widen(x[p]));
        s[p] = s_c;
        m[p] = larger(m[p], s_c);
      });
      std::fill(s + block.rows, s + kLanes, least);
    }
  } else {
    Acc largest = least;  // in registers, where in lanes each step would wait for the one before
#pragma omp simd reduction(max : largest)
    for (int64_t c = 0; c < block.C; ++c) {
      const Acc s_c = cap(widen(x[c]));
      s[c] = s_c;
      largest = larger(largest, s_c);
    }
    std::fill(s + block.C, s + block.steps() * kLanes, least);
    std::fill(m, m + kLanes, largest);
  }
}

// exp(s_c − m), where s_c was, and z = Σ exp(s − m) of every row. Meanwhile memory brings the next block's logits: it
// has nothing else to do, and else the next block would wait for it. (To prefetch beyond the last one is harmless.)
template <typename T, typename B, typename Acc>
FUSED_OPS_VECTORIZED void exponentiate(const T* x, B block, const Lanes<Acc>& m, Acc* s, Lanes<Acc>& z) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  const T* next = x + (B::kSideBySide ? kLanes : block.C);
  const Acc m_0 = m[0];
  Lanes<Acc> sums = {};  // not z itself: for all the compiler knows, it could lie where s does, and not in registers
  for (int64_t k = 0; k < block.steps(); ++k, s += kLanes, next += block.step()) {
    for (int64_t i = 0; i < kLanes; i += kCacheLine) __builtin_prefetch(next + i);
    for_lanes(kLanes, [&](int64_t p) {
      s[p] = exp_of_softmax(s[p] - (B::kSideBySide ? m[p] : m_0));
      sums[p] += s[p];
    });
  }
  block.merge(sums);
  std::copy(sums, sums + kLanes, z);
}

// Σ t of every row.
template <typename B, typename Targets, typename Acc>
FUSED_OPS_VECTORIZED void sum_targets(B block, Targets t, Lanes<Acc>& t_sum) {
  std::fill(t_sum, t_sum + kLanes, Acc(0));
  for (int64_t k = 0; k < block.steps(); ++k) {
    const int64_t lanes = block.lanes(k), first = k * block.step();
    for_lanes(lanes, [&](int64_t p) { t_sum[p] += t(block.class_of(k, p), first + p); });
  }
  block.merge(t_sum);
}

// Σ t·(m − s) of every row.
template <typename B, typename Targets, typename Acc>
FUSED_OPS_VECTORIZED void sum_distances(B block, const Acc* s, Targets t, const Lanes<Acc>& m, Lanes<Acc>& distance) {
  std::fill(distance, distance + kLanes, Acc(0));
  for (int64_t k = 0; k < block.steps(); ++k, s += kLanes) {
    const int64_t lanes = block.lanes(k), first = k * block.step();
    for_lanes(lanes, [&](int64_t p) { distance[p] += t(block.class_of(k, p), first + p) * (m[p] - s[p]); });
  }
  block.merge(distance);
}

// What a row's gradient is made of: dx_c = (a·exp(s_c − m) − g_t·t_c − [c = y]·g_y)·k_c, where a = gA/z.
template <typename Acc>
struct Factors {
  Lanes<Acc> a, g_t, g_y;
  Lanes<int32_t> y;
};

// exp(s_c − m) in steps, as the forward pass has them, and as they are found again; the same to the last bit.
template <typename Acc>
struct Exponentials {
  const Acc* e;

  Acc operator()(int64_t step, int64_t p, Acc) const { return e[step + p]; }
};

template <typename Acc>
struct ExponentialsAgain {
  const Acc* m;

  Acc operator()(int64_t, int64_t p, Acc s) const { return exp_of_softmax(s - m[p]); }
};

// dx of every row. It may lie where x does.
template <typename T, typename B, typename Cap, typename E, typename Targets, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void block_gradient(const T* x, B block, Cap cap, E e, Targets t, const Factors<Acc>& f, T* dx) {
  const auto gradient = [&](int64_t k, int64_t p, bool is_class) {
    const int64_t place = k * block.step() + p;
    const Acc s = cap(widen(x[place]));
    Acc q = f.a[p] * e(k * kLanes, p, s);
    if constexpr (Targets::kDense) q -= f.g_t[p] * t(block.class_of(k, p), place);
    if constexpr (!Targets::kProbabilities) q -= is_class ? f.g_y[p] : 0;
    return narrow<T>(q * cap.slope(s));
  };
  constexpr bool kOneClass =
      !B::kSideBySide && !Targets::kProbabilities;  // quicker put right than asked for in each lane
  const T dx_y = kOneClass ? gradient(f.y[0] / kLanes, f.y[0] % kLanes, true) : T(0);
  for (int64_t k = 0; k < block.steps(); ++k) {
    T* dx_k = dx + k * block.step();
    for_lanes(block.lanes(k), [&](int64_t p) { dx_k[p] = gradient(k, p, B::kSideBySide && f.y[p] == k); });
  }
  if constexpr (kOneClass) dx[f.y[0]] = dx_y;
}

// log z of every row, and 1/z from it.
template <typename B, typename Acc>
FUSED_OPS_VECTORIZED void logarithms(B block, const Lanes<Acc>& z, Lanes<Acc>& log_z) {
  for_lanes(block.rows, [&](int64_t p) { log_z[p] = log(z[p]); });
}

template <typename B, typename Acc>
FUSED_OPS_VECTORIZED void inverse_sums(B block, const Lanes<Acc>& log_z, Lanes<Acc>& inverse) {
  for_lanes(block.rows, [&](int64_t p) { inverse[p] = exp(-log_z[p]); });
}

// dy_c = g·dt/dy·(lse − s_c) of every row.
template <typename T, typename B, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void target_gradient(const T* x, B block, Cap cap, Targets t, const Acc* m, const Acc* log_z,
                                          const Acc* g, T* dy) {
  for (int64_t k = 0; k < block.steps(); ++k) {
    const int64_t lanes = block.lanes(k), first = k * block.step();
    for_lanes(lanes, [&](int64_t p) {
      const Acc neg_logp = log_z[p] - (cap(widen(x[first + p])) - m[p]);
      dy[first + p] = narrow<T>(g[p] * t.slope(block.class_of(k, p)) * neg_logp);
    });
  }
}

template <typename T>
FUSED_OPS_VECTORIZED void multiply(T* x, int64_t count, accumulate_t<T> by) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = narrow<T>(widen(x[i]) * by);
}

}  // namespace fused_ops
