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

// A value for each lane, or for each row of a block, of which there are at most as many.
template <typename Acc>
using Lanes = Acc[kLanes];

// Of a buffer: aligned, so that no vector lies in two cache lines.
template <typename Acc>
struct alignas(64) Step {
  Lanes<Acc> lanes;
};

// Rows that are worked on together. They are groups: rows side by side, of which each has a lane, are one; of rows that
// lie one after another each is one, spread over the lanes.
template <bool kSideBySide_>
struct Block {
  static constexpr bool kSideBySide = kSideBySide_;
  int64_t C, rows, D;  // D is how far apart the classes of a row lie

  int64_t groups() const { return kSideBySide ? 1 : rows; }
  int64_t steps() const { return kSideBySide ? C : ceil_div(C, kLanes); }
  int64_t step() const { return kSideBySide ? D : kLanes; }
  int64_t lanes(int64_t k) const { return kSideBySide ? rows : std::min(kLanes, C - k * kLanes); }
  int64_t class_of(int64_t k, int64_t p) const { return kSideBySide ? k : k * kLanes + p; }
  int64_t place(int64_t row, int64_t c) const { return kSideBySide ? c * D + row : row * C + c; }  // in memory
  int64_t start(int64_t group) const { return group * C; }                                         // in memory
  int64_t first_step(int64_t group) const { return group * steps() * kLanes; }                     // in a buffer
};

// What every lane has of a value of the rows; of a row that is spread over the lanes all have the same, in a register.
template <typename B, typename Acc>
struct OfGroup {
  const Acc* of_rows;
  Acc of_row;

  OfGroup(B, const Acc* of_rows_, int64_t group) : of_rows(of_rows_), of_row(of_rows_[B::kSideBySide ? 0 : group]) {}

  Acc operator[](int64_t p) const { return B::kSideBySide ? of_rows[p] : of_row; }
};

// f(p) for kWidth lanes, if so many are left, and then for half as many: vectors to the last lane, or nearly.
template <int64_t kWidth, typename F>
inline void for_lanes_left(int64_t first, int64_t lanes, const F& f) {
  if (lanes & kWidth) {
#pragma omp simd
    for (int64_t p = 0; p < kWidth; ++p) f(first + p);
  }
  if constexpr (kWidth > 1) for_lanes_left<kWidth / 2>(first + (lanes & kWidth), lanes, f);
}

// f(p) for every lane, mostly kLanes.
template <typename F>
inline void for_lanes(int64_t lanes, const F& f) {
  if (lanes == kLanes)
    for_lanes_left<kLanes>(0, kLanes, f);
  else
    for_lanes_left<kLanes / 2>(0, lanes, f);
}

template <typename Acc>
inline Acc larger(Acc a, Acc b) {
  return a < b ? b : a;  // passes over a NaN in b
}

// merged(a, b) of all lanes, by halves.
template <int64_t kWidth = kLanes, typename Acc, typename F>
inline Acc merge_lanes(Lanes<Acc>& lanes, const F& merged) {
  if constexpr (kWidth == 1) return lanes[0];
  constexpr int64_t kHalf = kWidth / 2;
#pragma omp simd
  for (int64_t p = 0; p < kHalf; ++p) lanes[p] = merged(lanes[p], lanes[p + kHalf]);
  return merge_lanes<kHalf>(lanes, merged);
}

// The sums of a group's lanes, to those of the rows.
template <typename B, typename Acc>
inline void add_up(B, int64_t group, Lanes<Acc>& of_lanes, Lanes<Acc>& of_rows) {
  if constexpr (B::kSideBySide)
    std::copy(of_lanes, of_lanes + kLanes, of_rows);
  else
    of_rows[group] = merge_lanes(of_lanes, [](Acc a, Acc b) { return a + b; });
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
    for (int64_t row = 0; row < block.rows; ++row, x += block.C, s += block.steps() * kLanes) {
      Lanes<Acc> largest;
      std::fill(largest, largest + kLanes, least);
      for (int64_t k = 0; k < block.steps(); ++k) {
        const int64_t c = std::min(k * kLanes, block.C - kLanes);  // the last step does some classes a second time
        for_lanes(kLanes, [&](int64_t p) {
          const Acc s_c = cap(widen(x[c + p]));
          s[c + p] = s_c;
          largest[p] = larger(largest[p], s_c);
        });
      }
      std::fill(s + block.C, s + block.steps() * kLanes, least);
      m[row] = merge_lanes(largest, larger<Acc>);
    }
  }
}

// exp(s_c − m), where s_c was, and z = Σ exp(s − m) of every row. Meanwhile memory brings the next block's logits: it
// has nothing else to do, and else the next block would wait for it. (To prefetch beyond the last one is harmless.)
template <typename T, typename B, typename Acc>
FUSED_OPS_VECTORIZED void exponentiate(const T* x, B block, const Lanes<Acc>& m, Acc* s, Lanes<Acc>& z) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  const T* next_block = x + (B::kSideBySide ? kLanes : block.rows * block.C);
  for (int64_t group = 0; group < block.groups(); ++group) {
    const T* next = next_block + block.start(group);
    const OfGroup m_of(block, m, group);
    Lanes<Acc> sums = {};
    for (int64_t k = 0; k < block.steps(); ++k, s += kLanes, next += block.step()) {
      for (int64_t i = 0; i < kLanes; i += kCacheLine) __builtin_prefetch(next + i);
      for_lanes(kLanes, [&](int64_t p) {
        s[p] = exp_of_softmax<T>(m_of[p] - s[p]);
        sums[p] += s[p];
      });
    }
    add_up(block, group, sums, z);
  }
}

// Σ t of every row.
template <typename B, typename Targets, typename Acc>
FUSED_OPS_VECTORIZED void sum_targets(B block, Targets targets, Lanes<Acc>& t_sum) {
  for (int64_t group = 0; group < block.groups(); ++group) {
    const auto t = targets.row(block.start(group));
    Lanes<Acc> sums = {};
    for (int64_t k = 0; k < block.steps(); ++k) {
      const int64_t first = k * block.step();
      for_lanes(block.lanes(k), [&](int64_t p) { sums[p] += t(block.class_of(k, p), first + p); });
    }
    add_up(block, group, sums, t_sum);
  }
}

// Σ t·(m − s) of every row.
template <typename B, typename Targets, typename Acc>
FUSED_OPS_VECTORIZED void sum_distances(B block, const Acc* s, Targets targets, const Lanes<Acc>& m,
                                        Lanes<Acc>& distance) {
  for (int64_t group = 0; group < block.groups(); ++group) {
    const auto t = targets.row(block.start(group));
    const OfGroup m_of(block, m, group);
    Lanes<Acc> sums = {};
    for (int64_t k = 0; k < block.steps(); ++k, s += kLanes) {
      const int64_t first = k * block.step();
      for_lanes(block.lanes(k), [&](int64_t p) { sums[p] += t(block.class_of(k, p), first + p) * (m_of[p] - s[p]); });
    }
    add_up(block, group, sums, distance);
  }
}

// What a row's gradient is made of: dx_c = (a·exp(s_c − m) − g_t·t_c − [c = y]·g_y)·k_c, where a = gA/z.
template <typename Acc>
struct Factors {
  Lanes<Acc> a, g_t, g_y;
  Lanes<int32_t> y;
};

// exp(s_c − m) of a group in steps, as the forward pass has them, and as they are found again; the same to the last
// bit.
template <typename Acc>
struct Exponentials {
  const Acc* e;

  template <typename B>
  auto of(B block, int64_t group) const {
    const Acc* of_group = e + block.first_step(group);
    return [=](int64_t step, int64_t p, Acc) { return of_group[step + p]; };
  }
};

template <typename T, typename Acc = accumulate_t<T>>
struct ExponentialsAgain {
  const Acc* m;

  template <typename B>
  auto of(B block, int64_t group) const {
    const OfGroup m_of(block, m, group);
    return [=](int64_t, int64_t p, Acc s) { return exp_of_softmax<T>(m_of[p] - s); };
  }
};

// dx of every row. It may lie where x does.
template <typename T, typename B, typename Cap, typename E, typename Targets, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void block_gradient(const T* x, B block, Cap cap, E exponentials, Targets targets,
                                         const Factors<Acc>& f, T* dx) {
  for (int64_t group = 0; group < block.groups(); ++group, x += block.C, dx += block.C) {
    const OfGroup a(block, f.a, group), g_t(block, f.g_t, group), g_y(block, f.g_y, group);
    const OfGroup y(block, f.y, group);
    const auto e = exponentials.of(block, group);
    const auto t = targets.row(block.start(group));
    const auto gradient = [&](int64_t k, int64_t p, bool is_class) {
      const int64_t place = k * block.step() + p;
      const Acc s = cap(widen(x[place]));
      Acc q = a[p] * e(k * kLanes, p, s);
      if constexpr (Targets::kDense) q -= g_t[p] * t(block.class_of(k, p), place);
      if constexpr (!Targets::kProbabilities) q -= is_class ? g_y[p] : 0;
      return narrow<T>(q * cap.slope(s));
    };
    constexpr bool kOneClass =
        !B::kSideBySide && !Targets::kProbabilities;  // quicker put right than asked for in each lane
    const T dx_y = kOneClass ? gradient(y[0] / kLanes, y[0] % kLanes, true) : T(0);
    for (int64_t k = 0; k < block.steps(); ++k) {
      T* dx_k = dx + k * block.step();
      for_lanes(block.lanes(k), [&](int64_t p) { dx_k[p] = gradient(k, p, B::kSideBySide && y[p] == k); });
    }
    if constexpr (kOneClass) dx[y[0]] = dx_y;
  }
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
FUSED_OPS_VECTORIZED void target_gradient(const T* x, B block, Cap cap, Targets t, const Lanes<Acc>& m,
                                          const Lanes<Acc>& log_z, const Lanes<Acc>& g, T* dy) {
  for (int64_t group = 0; group < block.groups(); ++group, x += block.C, dy += block.C) {
    const OfGroup m_of(block, m, group), log_z_of(block, log_z, group), g_of(block, g, group);
    for (int64_t k = 0; k < block.steps(); ++k) {
      const int64_t first = k * block.step();
      for_lanes(block.lanes(k), [&](int64_t p) {
        const Acc neg_logp = log_z_of[p] - (cap(widen(x[first + p])) - m_of[p]);
        dy[first + p] = narrow<T>(g_of[p] * t.slope(block.class_of(k, p)) * neg_logp);
      });
    }
  }
}

template <typename T>
FUSED_OPS_VECTORIZED void multiply(T* x, int64_t count, accumulate_t<T> by) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = narrow<T>(widen(x[i]) * by);
}

}  // namespace fused_ops
