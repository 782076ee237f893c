// What cross-entropy does with the elements of a block: jobs, which a sweep does alone or several at a time.
// Derivation and names: fused_ops/ops/cross_entropy.py.
#pragma once

#include "../cross_entropy.h"
#include "cross_entropy_block.h"

namespace fused_ops {

// s of every element.
template <typename T, typename Cap>
struct Logits {
  const T* x;
  Cap cap;

  template <typename B>
  Logits of(B block, int64_t group) const {
    return {x + block.start(group), cap};
  }
  accumulate_t<T> operator()(At at, int64_t p) const { return cap(widen(x[at.place + p])); }
};

// m = max s of every row.
template <typename T, typename Cap, typename Acc = accumulate_t<T>>
struct FindMaxima {
  Logits<T, Cap> s;
  Acc* m;

  template <typename B>
  struct Group {
    Logits<T, Cap> s;
    Acc* m;
    Largest<T> largest{};

    template <typename L>
    void step(At at, const L& for_lanes) {
      for_lanes([&](int64_t p) { largest.see(p, s.x[at.place + p]); });
    }
    void finish() {
      if constexpr (B::kSideBySide)
        for_lanes(kLanes, [&](int64_t p) { m[p] = s.cap(widen(largest.of_lane(p))); });
      else
        *m = s.cap(widen(largest.of_all()));
    }
  };

  template <typename B>
  Group<B> of(B block, int64_t group) const {
    return {s.of(block, group), m + group};
  }
};

// The targets in a step: rows side by side have one class there.
template <typename B, typename Targets>
inline auto of_step(B block, const Targets& t, At at) {
  if constexpr (B::kSideBySide)
    return t.of_class(block.class_of(at, 0));
  else
    return t;
}

// z = Σ exp(s − m) of every row and, of dense targets, Σ t·(m − s); and if they are kept exp(s_c − m), in steps.
template <bool kKept, typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
struct Exponentiate {
  Logits<T, Cap> s;
  Targets targets;
  const Acc* m;
  Acc *e, *z, *distance;

  template <typename B>
  struct Group {
    B block;
    Logits<T, Cap> s;
    Targets t;
    OfGroup<B, Acc> m;
    Acc *e, *z, *distance;
    Sums<Acc> sums{}, distances{};

    template <typename L>
    void step(At at, const L& for_lanes) {
      const auto t_at = of_step(block, t, at);
      for_lanes([&](int64_t p) {
        const Acc below = m[p] - s(at, p), e_c = exp_of_softmax<T>(below);
        if constexpr (kKept) e[at.in_buffer + p] = e_c;
        sums[p] += p < at.seen ? 0 : e_c;
        if constexpr (Targets::kDense)
          distances[p] += p < at.seen ? 0 : t_at(block.class_of(at, p), at.place + p) * below;
      });
    }
    void finish() {
      sums.template add_up<B>(z);
      if constexpr (Targets::kDense) distances.template add_up<B>(distance);
    }
  };

  template <typename B>
  Group<B> of(B block, int64_t group) const {
    const int64_t start = block.start(group);
    Acc* kept = e + block.first_step(group);
    return {block, s.of(block, group), targets.row(start), {block, m, group}, kept, z + group, distance + group};
  }
};

// Memory brings logits: while a sweep has nothing else for it to do, and so that the next one need not wait for them.
template <typename T>
struct Prefetch {
  const T* x;

  template <typename L>
  void step(At at, const L&) const {
    for (int64_t i = 0; i < kLanes; i += 64 / sizeof(T)) __builtin_prefetch(x + at.place + i);
  }
  void finish() const {}

  template <typename B>
  Prefetch of(B block, int64_t group) const {
    return {x + block.start(group)};
  }
};

// Σ t of every row.
template <typename Targets, typename Acc>
struct SumTargets {
  Targets targets;
  Acc* t_sum;

  template <typename B>
  struct Group {
    B block;
    Targets t;
    Acc* t_sum;
    Sums<Acc> sums{};

    template <typename L>
    void step(At at, const L& for_lanes) {
      const auto t_at = of_step(block, t, at);
      for_lanes([&](int64_t p) { sums[p] += p < at.seen ? 0 : t_at(block.class_of(at, p), at.place + p); });
    }
    void finish() { sums.template add_up<B>(t_sum); }
  };

  template <typename B>
  Group<B> of(B block, int64_t group) const {
    return {block, targets.row(block.start(group)), t_sum + group};
  }
};

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
  struct Group {
    const Acc* e;

    Acc operator()(At at, int64_t p, Acc) const { return e[at.in_buffer + p]; }
  };

  template <typename B>
  Group<B> of(B block, int64_t group) const {
    return {e + block.first_step(group)};
  }
};

template <typename T, typename Acc = accumulate_t<T>>
struct ExponentialsAgain {
  const Acc* m;

  template <typename B>
  struct Group {
    OfGroup<B, Acc> m;

    Acc operator()(At, int64_t p, Acc s) const { return exp_of_softmax<T>(m[p] - s); }
  };

  template <typename B>
  Group<B> of(B block, int64_t group) const {
    return {{block, m, group}};
  }
};

// dx of every row. It may lie where x does, if the steps do not overlap.
template <typename T, typename Cap, typename E, typename Targets, typename Acc = accumulate_t<T>>
struct WriteGradient {
  Logits<T, Cap> s;
  E exponentials;
  Targets targets;
  const Factors<Acc>& f;
  T* dx;

  template <typename B>
  struct Group {
    static constexpr bool kOneClass =
        !B::kSideBySide && !Targets::kProbabilities;  // quicker put right than asked for in each lane
    B block;
    Logits<T, Cap> s;
    typename E::template Group<B> e;
    Targets t;
    OfGroup<B, Acc> a, g_t, g_y;
    OfGroup<B, int32_t> y;
    T* dx;
    T dx_y = kOneClass ? gradient(t, At{y[0], y[0], 0}, 0, true) : T(0);

    template <typename OfStep>
    T gradient(const OfStep& t_at, At at, int64_t p, bool is_class) const {
      const Acc s_c = s(at, p);
      Acc q = a[p] * e(at, p, s_c);
      if constexpr (Targets::kDense) q -= g_t[p] * t_at(block.class_of(at, p), at.place + p);
      if constexpr (!Targets::kProbabilities) q -= is_class ? g_y[p] : 0;
      q *= s.cap.slope(s_c);
      return Targets::kDense ? narrow<T>(q) : narrow_away<T>(q);  // t could be any NaN
    }
    template <typename L>
    void step(At at, const L& for_lanes) {
      const auto t_at = of_step(block, t, at);
      for_lanes([&](int64_t p) {
        dx[at.place + p] = gradient(t_at, at, p, B::kSideBySide && y[p] == at.in_buffer / kLanes);
      });
    }
    void finish() {
      if constexpr (kOneClass) dx[y[0]] = dx_y;
    }
  };

  template <typename B>
  Group<B> of(B block, int64_t group) const {
    const int64_t start = block.start(group);
    return {block,
            s.of(block, group),
            exponentials.of(block, group),
            targets.row(start),
            {block, f.a, group},
            {block, f.g_t, group},
            {block, f.g_y, group},
            {block, f.y, group},
            dx + start};
  }
};

// dy_c = g·dt/dy·(lse − s_c) of every row.
template <typename T, typename Cap, typename Targets, typename Acc = accumulate_t<T>>
struct WriteTargetGradient {
  Logits<T, Cap> s;
  Targets targets;
  const Acc *m, *log_z, *g;
  T* dy;

  template <typename B>
  struct Group {
    B block;
    Logits<T, Cap> s;
    Targets t;
    OfGroup<B, Acc> m, log_z, g;
    T* dy;

    template <typename L>
    void step(At at, const L& for_lanes) {
      const auto t_at = of_step(block, t, at);
      for_lanes([&](int64_t p) {
        const Acc neg_logp = log_z[p] - (s(at, p) - m[p]);
        dy[at.place + p] = narrow<T>(g[p] * t_at.slope(block.class_of(at, p)) * neg_logp);
      });
    }
    void finish() {}
  };

  template <typename B>
  Group<B> of(B block, int64_t group) const {
    const int64_t start = block.start(group);
    return {block,     s.of(block, group), targets, {block, m, group}, {block, log_z, group}, {block, g, group},
            dy + start};
  }
};

// log z of every row, and 1/z from it.
template <typename B, typename Acc>
FUSED_OPS_VECTORIZED void logarithms(B block, const Lanes<Acc>& z, Lanes<Acc>& log_z) {
  for_lanes(block.rows, [&](int64_t p) { log_z[p] = log(z[p]); });
}

template <typename B, typename Acc>
FUSED_OPS_VECTORIZED void inverse_sums(B block, const Lanes<Acc>& log_z, Lanes<Acc>& inverse) {
  for_lanes(block.rows, [&](int64_t p) { inverse[p] = exp(-log_z[p]); });
}

template <typename T>
FUSED_OPS_VECTORIZED void multiply(T* x, int64_t count, accumulate_t<T> by) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = narrow<T>(widen(x[i]) * by);
}

}  // namespace fused_ops
