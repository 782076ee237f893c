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
#include "parallel.h"
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
  int64_t whole_steps() const { return kSideBySide ? (rows == kLanes ? C : 0) : C / kLanes; }
  int64_t step() const { return kSideBySide ? D : kLanes; }
  int64_t lanes(int64_t k) const { return kSideBySide ? rows : std::min(kLanes, C - k * kLanes); }
  int64_t class_of(int64_t in_buffer, int64_t p) const { return kSideBySide ? in_buffer / kLanes : in_buffer + p; }
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

// f(p) for all lanes, or for the first of them.
struct AllLanes {
  template <typename F>
  void operator()(const F& f) const {
    for_lanes_left<kLanes>(0, kLanes, f);
  }
};

struct FirstLanes {
  int64_t lanes;  // fewer than all

  template <typename F>
  void operator()(const F& f) const {
    for_lanes_left<kLanes / 2>(0, lanes, f);
  }
};

// f(p) for so many lanes, mostly all.
template <typename F>
inline void for_lanes(int64_t lanes, const F& f) {
  if (lanes == kLanes)
    AllLanes{}(f);
  else
    FirstLanes{lanes}(f);
}

// Calls f(k, for_lanes) for every step k of a group, where for_lanes(g) calls g(p) for its lanes. Those that have all
// of them come first, in a loop of their own, which keeps its constants in registers.
template <typename B, typename F>
inline void for_steps(B block, const F& f) {
  const int64_t whole = block.whole_steps();
  for (int64_t k = 0; k < whole; ++k) f(k, AllLanes{});
  for (int64_t k = whole; k < block.steps(); ++k) f(k, FirstLanes{block.lanes(k)});
}

// Calls f(place, place in a buffer, seen, for_lanes) for every step of a group, to merge its elements. The last step of
// a long row takes all lanes, too: as many of them as `seen` have classes of the step before. To merge some lanes and
// then read all would wait for the processor's stores.
template <typename B, typename F>
inline void for_steps_to_merge(B block, const F& f) {
  const int64_t whole = block.whole_steps();
  for (int64_t k = 0; k < whole; ++k) f(k * block.step(), k * kLanes, 0, AllLanes{});
  if constexpr (B::kSideBySide) {
    for (int64_t k = whole; k < block.steps(); ++k) f(k * block.step(), k * kLanes, 0, FirstLanes{block.rows});
  } else if (const int64_t last = block.C - kLanes; whole < block.steps()) {
    f(last, last, whole * kLanes - last, AllLanes{});
  }
}

template <typename Acc>
inline Acc larger(Acc a, Acc b) {
  return a < b ? b : a;  // passes over a NaN in b
}

template <typename Acc>
inline Acc smaller(Acc a, Acc b) {
  return b < a ? b : a;
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

// The largest of what each lane sees, passing over NaN.
template <typename T, bool k16Bits = sizeof(T) == 2>
struct Largest {
  Lanes<T> largest;

  Largest() { std::fill(largest, largest + kLanes, -std::numeric_limits<T>::infinity()); }

  void see(int64_t p, T x) { largest[p] = larger(largest[p], x); }
  T of_lane(int64_t p) const { return largest[p]; }
  T of_all() { return merge_lanes(largest, larger<T>); }
};

// Of 16 bits, in integers, of which a vector has twice as many as of floats: of positive values (and NaN) the largest
// has the most bits, of negative ones the least.
template <typename T>
struct Largest<T, true> {
  Lanes<int16_t> most;
  Lanes<uint16_t> least;

  Largest() {
    std::fill(most, most + kLanes, std::numeric_limits<int16_t>::min());
    std::fill(least, least + kLanes, narrow<T>(-std::numeric_limits<float>::infinity()).x);
  }

  void see(int64_t p, T x) {
    most[p] = larger(most[p], static_cast<int16_t>(x.x));
    least[p] = smaller(least[p], x.x);
  }
  T of_lane(int64_t p) const { return T(most[p] < 0 ? least[p] : static_cast<uint16_t>(most[p]), T::from_bits()); }
  T of_all() {
    most[0] = merge_lanes(most, larger<int16_t>);
    least[0] = merge_lanes(least, smaller<uint16_t>);
    return of_lane(0);
  }
};

// m = max s of every row. (Without __restrict a compiler must take x, of 16 bits, for what Largest writes to.)
template <typename T, typename B, typename Cap, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void find_maxima(const T* __restrict x, B block, Cap cap, Lanes<Acc>& m) {
  for (int64_t group = 0; group < block.groups(); ++group, x += block.C) {
    Largest<T> largest;
    for_steps_to_merge(block, [&](int64_t place, int64_t, int64_t, const auto& for_lanes) {
      for_lanes([&](int64_t p) { largest.see(p, x[place + p]); });
    });
    if constexpr (B::kSideBySide)
      for_lanes(kLanes, [&](int64_t p) { m[p] = cap(widen(largest.of_lane(p))); });
    else
      m[group] = cap(widen(largest.of_all()));
  }
}

// z = Σ exp(s − m) of every row and, of dense targets, Σ t·(m − s); and if they are kept exp(s_c − m), in steps.
// Meanwhile memory brings the next block's logits: it has nothing else to do, and else the next block would wait for
// it. (To prefetch beyond the last one is harmless.)
template <bool kKept, typename T, typename B, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void exponentiate(const T* x, B block, Cap cap, Targets targets, const Lanes<Acc>& m, Acc* e,
                                       Lanes<Acc>& z, Lanes<Acc>& distance) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  const int64_t to_next_block = B::kSideBySide ? kLanes : block.rows * block.C;
  for (int64_t group = 0; group < block.groups(); ++group, x += block.C, e += block.steps() * kLanes) {
    const OfGroup m_of(block, m, group);
    const auto t = targets.row(block.start(group));
    Lanes<Acc> sums = {}, distances = {};
    for_steps_to_merge(block, [&](int64_t place, int64_t in_buffer, int64_t seen, const auto& for_lanes) {
      for (int64_t i = 0; i < kLanes; i += kCacheLine) __builtin_prefetch(x + to_next_block + place + i);
      for_lanes([&](int64_t p) {
        const Acc below = m_of[p] - cap(widen(x[place + p])), e_c = exp_of_softmax<T>(below);
        if constexpr (kKept) e[in_buffer + p] = e_c;
        sums[p] += p < seen ? 0 : e_c;
        if constexpr (Targets::kDense)
          distances[p] += p < seen ? 0 : t(block.class_of(in_buffer, p), place + p) * below;
      });
    });
    add_up(block, group, sums, z);
    if constexpr (Targets::kDense) add_up(block, group, distances, distance);
  }
}

// Σ t of every row.
template <typename B, typename Targets, typename Acc>
FUSED_OPS_VECTORIZED void sum_targets(B block, Targets targets, Lanes<Acc>& t_sum) {
  for (int64_t group = 0; group < block.groups(); ++group) {
    const auto t = targets.row(block.start(group));
    Lanes<Acc> sums = {};
    for_steps_to_merge(block, [&](int64_t place, int64_t in_buffer, int64_t seen, const auto& for_lanes) {
      for_lanes([&](int64_t p) { sums[p] += p < seen ? 0 : t(block.class_of(in_buffer, p), place + p); });
    });
    add_up(block, group, sums, t_sum);
  }
}

// What a row's gradient is made of: dx_c = (a·exp(s_c − m) − g_t·t_c − [c = y]·g_y)·k_c, where a = gA/z. Any NaN is the
// usual one, as narrow_away needs it.
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
      if constexpr (Targets::kDense) q -= g_t[p] * t(block.class_of(k * kLanes, p), place);
      if constexpr (!Targets::kProbabilities) q -= is_class ? g_y[p] : 0;
      q *= cap.slope(s);
      return Targets::kDense ? narrow<T>(q) : narrow_away<T>(q);  // t could be any NaN
    };
    constexpr bool kOneClass =
        !B::kSideBySide && !Targets::kProbabilities;  // quicker put right than asked for in each lane
    const T dx_y = kOneClass ? gradient(y[0] / kLanes, y[0] % kLanes, true) : T(0);
    for_steps(block, [&](int64_t k, const auto& for_lanes) {
      T* dx_k = dx + k * block.step();
      for_lanes([&](int64_t p) { dx_k[p] = gradient(k, p, B::kSideBySide && y[p] == k); });
    });
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
    for_steps(block, [&](int64_t k, const auto& for_lanes) {
      const int64_t first = k * block.step();
      for_lanes([&](int64_t p) {
        const Acc neg_logp = log_z_of[p] - (cap(widen(x[first + p])) - m_of[p]);
        dy[first + p] = narrow<T>(g_of[p] * t.slope(block.class_of(k * kLanes, p)) * neg_logp);
      });
    });
  }
}

template <typename T>
FUSED_OPS_VECTORIZED void multiply(T* x, int64_t count, accumulate_t<T> by) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = narrow<T>(widen(x[i]) * by);
}

}  // namespace fused_ops
