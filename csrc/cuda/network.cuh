// The lecture's network in the shared memory of one block: its forward and backward pass in phases, between which the
// block waits for all its threads. Derivation and names: fused_ops/ops/mlp.py.
//
// A phase is a product, sums that a thread takes each on its own, or rows that a warp takes each. Every sum has a fixed
// order, so a result is the same every time.
#pragma once

#include <limits>

#include "products.cuh"

namespace fused_ops {

// What a gradient does. A Descend moves its parameter at once; a Write is for those who only want to know.
template <typename Acc>
struct Descend {
  static constexpr bool kMovesParameters = true;
  Acc lr;

  __device__ bool wanted() const { return true; }
  __device__ void operator()(Acc& p, int, Acc dp) const { p -= lr * dp; }
};

template <typename Acc>
struct Write {
  static constexpr bool kMovesParameters = false;
  Acc* gradients;  // of all parameters, one after the other; or null

  __device__ bool wanted() const { return gradients; }
  __device__ void operator()(Acc&, int i, Acc dp) const { gradients[i] = dp; }
};

struct Sizes {
  int64_t N, T, E, H, V;
};

template <typename Acc>
struct Norm {
  bool training;
  Acc momentum, eps;
};

// A minibatch: the contexts X (N, T), each followed by its target Y.
struct Minibatch {
  int* data;
  int T;

  __device__ int& X(int n, int t) const { return data[n * (T + 1) + t]; }
  __device__ int& Y(int n) const { return data[n * (T + 1) + T]; }
};

// Shared memory, handed out piece by piece; on the host, which has none, only counted.
struct Pieces {
  unsigned char* begin;
  int64_t bytes = 0;

  template <typename U>
  FUSED_OPS_HOST_DEVICE U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(begin + bytes);
    bytes += count * int64_t{sizeof(U)};
    return piece;
  }
};

template <typename Acc>
struct Network {
  int N, T, E, F, H, V;
  int units;                        // from one row of units to the next
  Acc *C, *W1, *b1;                 // (V, E), (F, H), (H)
  Acc *bngain, *bnbias, *W2, *b2;   // (H), (H), (V, H), (V)
  Acc *running_mean, *running_var;  // (H)
  Acc *mean, *r;                    // (H)
  Acc *embcat, *dembcat;            // (N, F)
  Acc *bnraw, *h, *dhprebn;         // (N, H); hprebn and dhpreact, too, lie where what comes of them does
  Acc *dlogits, *losses;            // (N, V), logits before; (N)
  int* indices;                     // of two minibatches: one at work, one on its way
  int64_t bytes;                    // of all these

  FUSED_OPS_HOST_DEVICE Network(const Sizes& s, unsigned char* memory)
      : N(s.N), T(s.T), E(s.E), F(s.T * s.E), H(s.H), V(s.V) {
    // Where threads share the sums over units, a warp reads 8 units in 4 rows at a time: so these lie in banks apart.
    const int64_t row = s.H + (32 + 8 - s.H % 32) % 32;
    units = row;
    Pieces pieces{memory};
    C = pieces.take<Acc>(s.V * s.E);
    W1 = pieces.take<Acc>(s.T * s.E * row);
    for (Acc** vector : {&b1, &bngain, &bnbias, &running_mean, &running_var, &mean, &r})
      *vector = pieces.take<Acc>(s.H);
    W2 = pieces.take<Acc>(s.V * row);
    b2 = pieces.take<Acc>(s.V);
    for (Acc** matrix : {&embcat, &dembcat}) *matrix = pieces.take<Acc>(s.N * s.T * s.E);
    for (Acc** matrix : {&bnraw, &h, &dhprebn}) *matrix = pieces.take<Acc>(s.N * row);
    dlogits = pieces.take<Acc>(s.N * s.V);
    losses = pieces.take<Acc>(s.N);
    indices = pieces.take<int>(2 * s.N * (s.T + 1));
    bytes = pieces.bytes;
  }

  __device__ Minibatch minibatch(int64_t k) const { return {indices + k % 2 * N * (T + 1), T}; }
};

// Calls f(i) for i < count, by a thread each, the last ones first: the first ones have more to do in products.
template <typename F>
__device__ void for_each(int count, const F& f) {
  for (int i = blockDim.x - 1 - threadIdx.x; i < count; i += blockDim.x) f(i);
}

// Calls f(i, j) for i < rows and j < columns, by a warp for each row.
template <typename F>
__device__ void for_rows(int rows, int columns, const F& f) {
  for (int i = threadIdx.x / kWarp; i < rows; i += blockDim.x / kWarp)
    for (int j = threadIdx.x % kWarp; j < columns; j += kWarp) f(i, j);
}

// ------------------------------------------------------------------------------------------------------------ forward

// embcat: the embeddings of each context, side by side.
template <typename Acc>
__device__ void embed(const Network<Acc>& net, const Minibatch& batch) {
  for_rows(net.N, net.F,
           [&](int n, int f) { net.embcat[n * net.F + f] = net.C[batch.X(n, f / net.E) * net.E + f % net.E]; });
}

template <typename Acc>
__device__ void make_hprebn(const Network<Acc>& net) {
  const Strided<Acc> embcat{net.embcat, net.F, 1}, W1{net.W1, net.units, 1};
  product<1>(net.N, net.H, net.F, embcat, W1,
             [&](int n, int j, Acc sum) { net.bnraw[n * net.units + j] = sum + net.b1[j]; });
}

// The mean and r of each unit.
template <typename Acc>
__device__ void make_statistics(const Network<Acc>& net, const Norm<Acc>& norm) {
  for_each(net.H, [&](int j) {
    Acc mean = net.running_mean[j], var = net.running_var[j];
    if (norm.training) {
      const Acc N = net.N;
      const Acc* hprebn = net.bnraw + j;
      Acc sum = 0, squares = 0;
      for (int n = 0; n < net.N; ++n) sum += hprebn[n * net.units];
      mean = sum / N;
      for (int n = 0; n < net.N; ++n) {
        const Acc distance = hprebn[n * net.units] - mean;
        squares += distance * distance;
      }
      var = squares / N;
      net.running_mean[j] = (1 - norm.momentum) * net.running_mean[j] + norm.momentum * mean;
      net.running_var[j] = (1 - norm.momentum) * net.running_var[j] + norm.momentum * (var * (N / (N - 1)));
    }
    net.mean[j] = mean;
    net.r[j] = 1 / std::sqrt(var + norm.eps);
  });
}

template <typename Acc>
__device__ void make_h(const Network<Acc>& net) {
  for_rows(net.N, net.H, [&](int n, int j) {
    const int i = n * net.units + j;
    const Acc bnraw = (net.bnraw[i] - net.mean[j]) * net.r[j];
    net.bnraw[i] = bnraw;
    net.h[i] = tanh(net.bngain[j] * bnraw + net.bnbias[j]);
  });
}

template <typename Acc>
__device__ void make_logits(const Network<Acc>& net) {
  const Strided<Acc> h{net.h, net.units, 1}, W2_t{net.W2, 1, net.units};
  product<8>(net.N, net.V, net.H, h, W2_t,
             [&](int n, int v, Acc sum) { net.dlogits[n * net.V + v] = sum + net.b2[v]; });
}

// The losses and dlogits, where the logits were.
template <typename Acc>
__device__ void make_losses(const Network<Acc>& net, const Minibatch& batch) {
  const int lane = threadIdx.x % kWarp;
  for (int n = threadIdx.x / kWarp; n < net.N; n += blockDim.x / kWarp) {
    Acc* row = net.dlogits + n * net.V;
    Acc m = -std::numeric_limits<Acc>::infinity(), z = 0;
    for (int v = lane; v < net.V; v += kWarp) m = fmax(m, row[v]);  // passes over a NaN, which the sum meets
    m = warp_reduce(m, [](Acc a, Acc b) { return fmax(a, b); });
    for (int v = lane; v < net.V; v += kWarp) z += exp(row[v] - m);
    z = warp_reduce(z, [](Acc a, Acc b) { return a + b; });
    for (int v = lane; v < net.V; v += kWarp) {
      const Acc shifted = row[v] - m;
      const bool is_target = v == batch.Y(n);
      if (is_target) net.losses[n] = log(z) - shifted;
      row[v] = (exp(shifted) / z - Acc(is_target)) / net.N;
    }
  }
}

template <typename Acc>
__device__ void write_mean_loss(const Network<Acc>& net, Acc* loss) {
  for_each(1, [&](int) {
    double sum = 0;
    for (int n = 0; n < net.N; ++n) sum += net.losses[n];
    *loss = sum / net.N;
  });
}

// ----------------------------------------------------------------------------------------------------------- backward

template <typename Acc>
__device__ void make_dhpreact(const Network<Acc>& net) {
  const Strided<Acc> dlogits{net.dlogits, net.V, 1}, W2{net.W2, net.units, 1};
  product<1>(net.N, net.H, net.V, dlogits, W2, [&](int n, int j, Acc dh) {
    const Acc h = net.h[n * net.units + j];
    net.dhprebn[n * net.units + j] = dh * (1 - h * h);
  });
}

// Where the gradient of each parameter lies in the op's result.
template <typename Acc>
struct Offsets {
  int W1, b1, bngain, bnbias, W2, b2;

  __device__ explicit Offsets(const Network<Acc>& net)
      : W1(net.V * net.E),
        b1(W1 + net.H * net.F),
        bngain(b1 + net.H),
        bnbias(bngain + net.H),
        W2(bnbias + net.H),
        b2(W2 + net.V * net.H) {}
};

template <typename Acc, typename Emit>
__device__ void make_dW2_and_db2(const Network<Acc>& net, const Emit& emit) {
  const Offsets<Acc> at(net);
  const Strided<Acc> dlogits_t{net.dlogits, 1, net.V}, h{net.h, net.units, 1};
  product<1>(net.V, net.H, net.N, dlogits_t, h,
             [&](int v, int j, Acc dW2) { emit(net.W2[v * net.units + j], at.W2 + v * net.H + j, dW2); });
  for_each(net.V, [&](int v) {
    Acc db2 = 0;
    for (int n = 0; n < net.N; ++n) db2 += net.dlogits[n * net.V + v];
    emit(net.b2[v], at.b2 + v, db2);
  });
}

// dhprebn, where dhpreact was, and the gradients of all that a unit has one of.
template <typename Acc, typename Emit>
__device__ void make_dhprebn(const Network<Acc>& net, const Norm<Acc>& norm, const Emit& emit) {
  const Offsets<Acc> at(net);
  for_each(net.H, [&](int j) {
    Acc *dhprebn = net.dhprebn + j, *bnraw = net.bnraw + j;
    Acc dbngain = 0, dbnbias = 0, db1 = 0;
    for (int n = 0; n < net.N; ++n) {
      dbngain += dhprebn[n * net.units] * bnraw[n * net.units];
      dbnbias += dhprebn[n * net.units];
    }
    const Acc scale = net.bngain[j] * net.r[j], mean = dbnbias / net.N, mean_bnraw = dbngain / net.N;
    for (int n = 0; n < net.N; ++n) {
      Acc centred = dhprebn[n * net.units];
      if (norm.training) centred -= mean + bnraw[n * net.units] * mean_bnraw;
      dhprebn[n * net.units] = scale * centred;
      db1 += scale * centred;
    }
    emit(net.bngain[j], at.bngain + j, dbngain);
    emit(net.bnbias[j], at.bnbias + j, dbnbias);
    emit(net.b1[j], at.b1 + j, db1);
  });
}

template <typename Acc>
__device__ void make_dembcat(const Network<Acc>& net) {
  const Strided<Acc> dhprebn{net.dhprebn, net.units, 1}, W1_t{net.W1, 1, net.units};
  product<8>(net.N, net.F, net.H, dhprebn, W1_t, [&](int n, int f, Acc sum) { net.dembcat[n * net.F + f] = sum; });
}

// Each element of dC looks for its character in the contexts: so its sum, too, has an order.
template <typename Acc, typename Emit>
__device__ void make_dW1_and_dC(const Network<Acc>& net, const Minibatch& batch, const Emit& emit) {
  const Offsets<Acc> at(net);
  const Strided<Acc> embcat_t{net.embcat, 1, net.F}, dhprebn{net.dhprebn, net.units, 1};
  product<1>(net.F, net.H, net.N, embcat_t, dhprebn,
             [&](int f, int j, Acc dW1) { emit(net.W1[f * net.units + j], at.W1 + j * net.F + f, dW1); });
  for_each(net.V * net.E, [&](int i) {
    const int character = i / net.E, e = i % net.E;
    Acc dC = 0;
    for (int n = 0; n < net.N; ++n)
      for (int t = 0; t < net.T; ++t)
        if (batch.X(n, t) == character) dC += net.dembcat[n * net.F + t * net.E + e];
    emit(net.C[i], i, dC);
  });
}

}  // namespace fused_ops
