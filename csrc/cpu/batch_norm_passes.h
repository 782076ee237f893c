// The passes of batch normalisation over a tile, with and without an activation. Derivation and names:
// fused_ops/ops/batch_norm.py.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>

#include "../activations.h"
#include "../checks.h"
#include "../name.h"
#include "tiles.h"

namespace fused_ops {

// What z = (x − μ)·γr + β + residual is made of.
template <typename T, typename Acc = accumulate_t<T>>
struct PreActivation {
  const T* x;
  const T* residual;  // or null
  const Acc *mean, *scale, *bias;
};

// use(z), where z(c, i) is that of the element at index i, of channel c.
template <typename T, typename Use>
inline void with_z(const PreActivation<T>& f, const Use& use) {
  const auto affine = [x = f.x, mean = f.mean, scale = f.scale, bias = f.bias](int64_t c, int64_t i) {
    return (widen(x[i]) - mean[c]) * scale[c] + bias[c];
  };
  if (f.residual)
    use([affine, residual = f.residual](int64_t c, int64_t i) { return affine(c, i) + widen(residual[i]); });
  else
    use(affine);
}

template <typename A, typename T>
FUSED_OPS_VECTORIZED void tile_forward(const Layout& l, const Tile& t, const PreActivation<T>& f, T* y,
                                       int64_t streamed_from) {
  with_z(f, [&](const auto& z) {
    write_each(l, t, y, [=](int64_t c, int64_t i) { return narrow<T>(A::value(z(c, i))); }, streamed_from);
  });
}

// use(dz), where dz(c, i) = dy·a'(z). Without an activation it is dy.
template <typename A, typename T, typename Use>
inline void with_dz(const PreActivation<T>& f, const T* dy, const Use& use) {
  if constexpr (std::is_same_v<A, Identity>)
    use([dy](int64_t, int64_t i) { return widen(dy[i]); });
  else
    with_z(f, [&](const auto& z) {
      use([dy, z](int64_t c, int64_t i) { return A::derivative(z(c, i)) * widen(dy[i]); });
    });
}

// use(dz), where dz(c, i) writes what it returns to kept[i], too; unless that is null, which a loop must not ask: some
// compilers would not vectorise it.
template <typename T, typename Dz, typename Use>
inline void with_kept(const Dz& dz, T* kept, const Use& use) {
  if (kept)
    use([dz, kept](int64_t c, int64_t i) {
      const auto dz_i = dz(c, i);
      kept[i] = narrow<T>(dz_i);
      return dz_i;
    });
  else
    use(dz);
}

// Σ dz and Σ dz·(x − μ); and dz itself, unless `kept` is null
template <typename A, typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_sums(const Layout& l, const Tile& t, const PreActivation<T>& f, const T* dy, Acc* dz_sum,
                                    Acc* dz_distance_sum, T* kept) {
  for (Acc* v : {dz_sum, dz_distance_sum}) std::fill(v + t.c_begin, v + t.c_end, Acc(0));
  const auto add = [&, x = f.x, mean = f.mean](const auto& dz) {
    add_up(l, t, dz_sum, dz_distance_sum, [=](int64_t c, int64_t i) {
      const Acc dz_i = dz(c, i);
      return Pair<Acc>{dz_i, dz_i * (widen(x[i]) - mean[c])};
    });
  };
  with_dz<A>(f, dy, [&](const auto& dz) {
    if constexpr (std::is_same_v<T, Acc>)
      with_kept(dz, kept, add);
    else
      add(dz);  // `kept` would round it
  });
}

// Of each channel the mean of dz, and r·mean(dz·x̂); null in evaluation, where dx does not depend on them.
template <typename Acc>
struct Means {
  const Acc *dz, *x_hat_share;
};

// dx = γr·(dz − mean(dz) − x̂·mean(dz·x̂)), in evaluation dx = γr·dz; and dresidual = dz. Null: not needed.
template <typename A, typename T, typename Acc = accumulate_t<T>>
FUSED_OPS_VECTORIZED void tile_backward(const Layout& l, const Tile& t, const PreActivation<T>& f, const T* dy,
                                        const Means<Acc>& means, T* dx, T* dresidual) {
  if (!dx && !dresidual) return;
  with_dz<A>(f, dy, [&](const auto& dz) {
    if (!dx) return write_each(l, t, dresidual, [=](int64_t c, int64_t i) { return narrow<T>(dz(c, i)); });
    with_kept(dz, dresidual, [&, x = f.x, mean = f.mean, scale = f.scale](const auto& dz_kept) {
      if (means.dz)
        write_each(l, t, dx, [=, dz_mean = means.dz, x_hat_share = means.x_hat_share](int64_t c, int64_t i) {
          return narrow<T>(scale[c] * (dz_kept(c, i) - dz_mean[c] - (widen(x[i]) - mean[c]) * x_hat_share[c]));
        });
      else
        write_each(l, t, dx, [=](int64_t c, int64_t i) { return narrow<T>(scale[c] * dz_kept(c, i)); });
    });
  });
}

// The passes over a tile with an activation.
template <typename T>
struct Passes {
  decltype(&tile_forward<Identity, T>) forward;
  decltype(&tile_sums<Identity, T>) sums;
  decltype(&tile_backward<Identity, T>) backward;
  bool cheap;
};

template <typename T>
Passes<T> passes_with(const std::optional<Name>& activation) {
  Passes<T> passes;
  const auto take = [&](auto a) {
    using A = decltype(a);
    passes = {tile_forward<A, T>, tile_sums<A, T>, tile_backward<A, T>, A::kCheap};
  };
  take(Identity{});
  STD_TORCH_CHECK(!activation || dispatch_activation(*activation, take), "batch_norm: there is no activation ",
                  *activation);
  return passes;
}

}  // namespace fused_ops
