// The lecture's network in memory of its own: its forward and backward pass and its step of gradient descent.
// Derivation and names: fused_ops/ops/mlp.py.
//
// The hidden units lie along memory in every matrix, so they are what vectors are made of: W1 is transposed here, and H
// padded with zeros, which stay zeros. The work is cut into blocks of hidden units, or of examples, which need nothing
// of each other: the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "parallel.h"
#include "products.h"
#include "vectorize.h"

namespace fused_ops {

struct Sizes {
  int64_t N, T, E, F, H, V;  // F = T·E
};

// The parameters, or their gradients, one after the other in memory.
template <typename Acc>
struct Parameters {
  Acc *C, *W1, *b1, *bngain, *bnbias, *W2, *b2;  // (V, E), (F, H), (H), (H), (H), (V, H), (V)
  int64_t count;                                 // of all elements, with the padding
};

// Memory for one network: zeros, each array at the start of a cache line.
template <typename Acc>
class Memory {
 public:
  explicit Memory(int64_t count) : storage_(count + 64) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    next_ = storage_.data() + (64 - address % 64) % 64 / sizeof(Acc);
  }

  static int64_t padded(int64_t count) { return ceil_div(count * sizeof(Acc), 64) * 64 / sizeof(Acc); }

  Acc* take(int64_t count) {
    Acc* array = next_;
    next_ += padded(count);
    return array;
  }

 private:
  std::vector<Acc> storage_;
  Acc* next_;
};

template <typename Acc>
struct Network {
  Sizes s;
  int64_t H, V;  // padded to whole vectors
  Memory<Acc> memory;
  Parameters<Acc> p, d;             // and their gradients
  Acc *running_mean, *running_var;  // (H)
  Acc *mean, *var, *r;              // (H)
  Acc *embcat, *dembcat;            // (N, F)
  Acc *bnraw, *h, *dhprebn;         // (N, H); hprebn and dhpreact, too, lie where what comes of them does
  Acc *dlogits, *losses;            // (N, V), logits before; (N)
  std::vector<int64_t> X, Y;        // (N, T), (N)
  bool training;
  Acc momentum, eps;

  Network(const Sizes& sizes, bool training_, double momentum_, double eps_)
      : s(sizes),
        H(ceil_div(s.H, kLanes<Acc>) * kLanes<Acc>),
        V(ceil_div(s.V, kLanes<Acc>) * kLanes<Acc>),
        memory(2 * parameter_count() + 5 * padded(H) + padded(s.N) + 2 * padded(s.N * s.F) + 3 * padded(s.N * H) +
               padded(s.N * V)),
        X(s.N * s.T),
        Y(s.N),
        training(training_),
        momentum(static_cast<Acc>(momentum_)),
        eps(static_cast<Acc>(eps_)) {
    for (Parameters<Acc>* block : {&p, &d})
      *block = {memory.take(s.V * s.E), memory.take(s.F * H), memory.take(H),   memory.take(H),
                memory.take(H),         memory.take(s.V * H), memory.take(s.V), parameter_count()};
    for (Acc** array : {&running_mean, &running_var, &mean, &var, &r}) *array = memory.take(H);
    losses = memory.take(s.N);
    for (Acc** array : {&embcat, &dembcat}) *array = memory.take(s.N * s.F);
    for (Acc** array : {&bnraw, &h, &dhprebn}) *array = memory.take(s.N * H);
    dlogits = memory.take(s.N * V);
  }

  static int64_t padded(int64_t count) { return Memory<Acc>::padded(count); }
  int64_t parameter_count() const {
    return padded(s.V * s.E) + padded(s.F * H) + 3 * padded(H) + padded(s.V * H) + padded(s.V);
  }
};

// ------------------------------------------------------------------------------------------------------------ forward

// embcat: the embeddings of each context, side by side.
template <typename Acc>
FUSED_OPS_VECTORIZED void embed(const Network<Acc>& net) {
  const int64_t N = net.s.N, T = net.s.T, E = net.s.E;
  for (int64_t i = 0; i < N * T; ++i) {
    const Acc* embedding = net.p.C + net.X[i] * E;
    Acc* emb = net.embcat + i * E;
#pragma omp simd
    for (int64_t e = 0; e < E; ++e) emb[e] = embedding[e];
  }
}

// The hidden units [begin, end): hprebn, their statistics, bnraw and h.
template <typename Acc>
FUSED_OPS_VECTORIZED void forward_units(const Network<Acc>& net, int64_t begin, int64_t end) {
  const int64_t N = net.s.N, F = net.s.F, H = net.H;
  Acc *mean = net.mean, *var = net.var, *r = net.r, *bnraw = net.bnraw, *h = net.h;
  const Acc *gain = net.p.bngain, *bias = net.p.bnbias;
  const Strided<Acc> embcat{net.embcat, F, 1};
  product(N, end - begin, F, embcat, net.p.W1 + begin, H, net.p.b1 + begin, bnraw + begin, H);
  if (net.training) {
    const Acc share = 1 / static_cast<Acc>(N), unbiased = static_cast<Acc>(N) / static_cast<Acc>(N - 1);
    for (int64_t j = begin; j < end; j += kLanes<Acc>) {
      Vector<Acc> sum{}, squares{};
      for (int64_t n = 0; n < N; ++n) sum += load(bnraw + n * H + j);
      const Vector<Acc> mean_j = sum * share;
      for (int64_t n = 0; n < N; ++n) {
        const Vector<Acc> distance = load(bnraw + n * H + j) - mean_j;
        squares += distance * distance;
      }
      const Vector<Acc> var_j = squares * share, old_mean = load(net.running_mean + j);
      store(mean + j, mean_j);
      store(var + j, var_j);
      store(net.running_mean + j, (1 - net.momentum) * old_mean + net.momentum * mean_j);
      store(net.running_var + j, (1 - net.momentum) * load(net.running_var + j) + net.momentum * (var_j * unbiased));
    }
  } else {
    std::copy(net.running_mean + begin, net.running_mean + end, mean + begin);
    std::copy(net.running_var + begin, net.running_var + end, var + begin);
  }
  for (int64_t j = begin; j < end; ++j) r[j] = 1 / std::sqrt(var[j] + net.eps);
  for (int64_t n = 0; n < N; ++n) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      const Acc x_hat = (bnraw[n * H + j] - mean[j]) * r[j];
      bnraw[n * H + j] = x_hat;
      h[n * H + j] = tanh(gain[j] * x_hat + bias[j]);
    }
  }
}

// The examples [begin, end): logits, losses and dlogits.
template <typename Acc>
FUSED_OPS_VECTORIZED void loss_of_examples(const Network<Acc>& net, int64_t begin, int64_t end) {
  const int64_t H = net.H, V = net.V;
  const Acc share = 1 / static_cast<Acc>(net.s.N);
  dots(end - begin, net.s.V, H, net.h + begin * H, H, net.p.W2, H, net.p.b2, net.dlogits + begin * V, V);
  for (int64_t n = begin; n < end; ++n) {
    Acc* row = net.dlogits + n * V;
    std::fill(row + net.s.V, row + V, -std::numeric_limits<Acc>::infinity());  // of probability zero
    Acc m = row[0], z = 0;
#pragma omp simd reduction(max : m)
    for (int64_t v = 0; v < V; ++v) m = m < row[v] ? row[v] : m;
    const Acc target = row[net.Y[n]];
#pragma omp simd reduction(+ : z)
    for (int64_t v = 0; v < V; ++v) {
      row[v] = exp_of_softmax<Acc>(m - row[v]);
      z += row[v];
    }
    net.losses[n] = std::log(z) - (target - m);
    const Acc scale = share / z;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) row[v] *= scale;
    row[net.Y[n]] -= share;
  }
}

// ----------------------------------------------------------------------------------------------------------- backward

// The hidden units [begin, end): the gradients of all that is theirs.
template <typename Acc>
FUSED_OPS_VECTORIZED void backward_units(const Network<Acc>& net, int64_t begin, int64_t end) {
  const int64_t N = net.s.N, F = net.s.F, V = net.s.V, H = net.H, units = end - begin;
  const Acc *bnraw = net.bnraw, *h = net.h;
  Acc* dhprebn = net.dhprebn;
  const Strided<Acc> dlogits{net.dlogits, net.V, 1}, dlogits_t{net.dlogits, 1, net.V}, embcat_t{net.embcat, 1, F};
  product<Acc>(V, units, N, dlogits_t, h + begin, H, nullptr, net.d.W2 + begin, H);
  product<Acc>(N, units, V, dlogits, net.p.W2 + begin, H, nullptr, dhprebn + begin, H);  // dh, for now
  const Acc share = net.training ? 1 / static_cast<Acc>(N) : Acc(0);
  for (int64_t j = begin; j < end; j += kLanes<Acc>) {
    Vector<Acc> dgain{}, dbias{}, db1{};
    for (int64_t n = 0; n < N; ++n) {
      const Vector<Acc> h_n = load(h + n * H + j), dhpreact = load(dhprebn + n * H + j) * (1 - h_n * h_n);
      store(dhprebn + n * H + j, dhpreact);
      dgain += dhpreact * load(bnraw + n * H + j);
      dbias += dhpreact;
    }
    store(net.d.bngain + j, dgain);
    store(net.d.bnbias + j, dbias);
    const Vector<Acc> scale = load(net.p.bngain + j) * load(net.r + j);
    for (int64_t n = 0; n < N; ++n) {
      const Vector<Acc> through_statistics = (dbias + load(bnraw + n * H + j) * dgain) * share;
      const Vector<Acc> gradient = scale * (load(dhprebn + n * H + j) - through_statistics);
      store(dhprebn + n * H + j, gradient);
      db1 += gradient;
    }
    store(net.d.b1 + j, db1);
  }
  product<Acc>(F, units, N, embcat_t, dhprebn + begin, H, nullptr, net.d.W1 + begin, H);
}

// dembcat of the examples [begin, end).
template <typename Acc>
FUSED_OPS_VECTORIZED void backward_examples(const Network<Acc>& net, int64_t begin, int64_t end) {
  const int64_t F = net.s.F, H = net.H;
  dots<Acc>(end - begin, F, H, net.dhprebn + begin * H, H, net.p.W1, H, nullptr, net.dembcat + begin * F, F);
}

// dC and db2, which all examples share: in their order.
template <typename Acc>
FUSED_OPS_VECTORIZED void backward_shared(const Network<Acc>& net) {
  const auto [N, T, E, F, H, V] = net.s;
  std::fill_n(net.d.C, V * E, Acc(0));
  for (int64_t i = 0; i < N * T; ++i) {
    Acc* dC = net.d.C + net.X[i] * E;
    const Acc* dembedding = net.dembcat + i * E;
#pragma omp simd
    for (int64_t e = 0; e < E; ++e) dC[e] += dembedding[e];
  }
  std::fill_n(net.d.b2, V, Acc(0));
  for (int64_t n = 0; n < N; ++n) {
    const Acc* dlogits = net.dlogits + n * net.V;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) net.d.b2[v] += dlogits[v];
  }
}

// p ← p − lr·dp
template <typename Acc>
FUSED_OPS_VECTORIZED void descend(const Network<Acc>& net, Acc lr, int64_t begin, int64_t end) {
  Acc *p = net.p.C, *d = net.d.C;  // the first of all
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) p[i] -= lr * d[i];
}

// -------------------------------------------------------------------------------------------------- the network

// Calls f(begin, end) for blocks of [0, size), each of `work` multiplications an element.
template <typename F>
void in_blocks(int64_t size, int64_t block, int64_t work, const F& f) {
  constexpr int64_t kWorkPerTask = 1 << 21;  // tens of microseconds: less is done before another thread has begun
  const int64_t grain = std::max<int64_t>(1, kWorkPerTask / std::max<int64_t>(1, block * work));
  parallel_for(0, ceil_div(size, block), grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * block, std::min((i + 1) * block, size));
  });
}

template <typename Acc>
constexpr int64_t kUnits = 9 * kLanes<Acc>;  // a block: three times the vectors of a block of sums
constexpr int64_t kExamples = 8;

// The loss, and the gradients if they are needed.
template <typename Acc>
Acc run(const Network<Acc>& net, bool needs_gradients) {
  const Sizes& s = net.s;
  embed(net);
  in_blocks(net.H, kUnits<Acc>, s.N * s.F, [&](int64_t i, int64_t end) { forward_units(net, i, end); });
  in_blocks(s.N, kExamples, net.H * s.V, [&](int64_t n, int64_t end) { loss_of_examples(net, n, end); });
  if (needs_gradients) {
    in_blocks(net.H, kUnits<Acc>, s.N * (s.F + 2 * s.V), [&](int64_t i, int64_t end) { backward_units(net, i, end); });
    in_blocks(s.N, kExamples, net.H * s.F, [&](int64_t n, int64_t end) { backward_examples(net, n, end); });
    backward_shared(net);
  }
  double sum = 0;
  for (int64_t n = 0; n < s.N; ++n) sum += net.losses[n];
  return static_cast<Acc>(sum / s.N);
}

}  // namespace fused_ops
