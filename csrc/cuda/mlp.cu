// The lecture's network in one call, and its training in another. Derivation and names: fused_ops/ops/mlp.py.
//
// Both are one kernel of one block, which reads the parameters from memory once and then has all it needs in shared
// memory, for as many steps as there are. Where that is too small, the reference runs instead. Nothing is read back to
// the host: an index out of bounds stops the kernel with a device-side assertion.
#include <array>
#include <cassert>
#include <cstdio>

#include "../empty.h"
#include "channels.cuh"
#include "network.cuh"

namespace fused_ops {
namespace {

// So many that each has the registers it needs; float64 needs more.
template <typename Acc>
constexpr int kThreadsOfNetwork = std::is_same_v<Acc, double> ? 256 : 512;

// A parameter as it is given: a matrix, or a vector as its only row, of any strides.
template <typename T>
struct Given {
  T* data;
  int rows, columns;
  int64_t row, column;

  Given(const Tensor& t, int64_t rows_, int64_t columns_, const Tensor& beside, bool written, const char* name)
      : data(written ? t.mutable_data_ptr<T>() : const_cast<T*>(t.const_data_ptr<T>())),
        rows(rows_),
        columns(columns_),
        row(t.dim() == 2 ? t.stride(0) : 0),
        column(t.dim() ? t.stride(t.dim() - 1) : 0) {
    const bool fits = t.dim() == 2 ? t.size(0) == rows_ && t.size(1) == columns_
                                   : t.dim() == 1 && rows_ == 1 && t.size(0) == columns_;
    STD_TORCH_CHECK(fits, "mlp: ", name, " should be (", rows_, ", ", columns_, ")");
    check_same_device(t, beside, name);
  }

  __device__ T& at(int i) const { return data[i / columns * row + i % columns * column]; }
  __device__ int size() const { return rows * columns; }
};

template <typename T>
struct Parameters {
  Given<T> C, W1, b1, bngain, bnbias, W2, b2;

  // Calls f(given, place) with each parameter and its place in the network.
  template <typename Acc, typename F>
  __device__ void for_each(const Network<Acc>& net, const F& f) const {
    f(C, Strided<Acc>{net.C, net.E, 1});
    f(W1, Strided<Acc>{net.W1, 1, net.units});
    f(b1, Strided<Acc>{net.b1, 0, 1});
    f(bngain, Strided<Acc>{net.bngain, 0, 1});
    f(bnbias, Strided<Acc>{net.bnbias, 0, 1});
    f(W2, Strided<Acc>{net.W2, net.units, 1});
    f(b2, Strided<Acc>{net.b2, 0, 1});
  }
};

// The minibatches: rows of X and Y, those that ix (K, N) names, or all of them once (K = 1).
struct Examples {
  const int64_t *X, *Y, *ix;  // ix or null
  int64_t M, K;

  __device__ static int64_t checked(int64_t index, int64_t size, const char* name) {
    const bool in_bounds = index >= 0 && index < size;
    if (!in_bounds) printf("%s %lld is out of bounds.\n", name, static_cast<long long>(index));
    assert(in_bounds);
    return in_bounds ? index : 0;
  }

  // Brings the k-th minibatch, if there is one.
  template <typename Acc>
  __device__ void take(int64_t k, const Network<Acc>& net) const {
    if (k >= K) return;
    const Minibatch batch = net.minibatch(k);
    for_each(net.N * (net.T + 1), [&](int i) {
      const int n = i / (net.T + 1), t = i % (net.T + 1);
      const int64_t example = ix ? checked(ix[k * net.N + n], M, "Example") : n;
      if (t < net.T)
        batch.X(n, t) = checked(X[example * net.T + t], net.V, "Index");
      else
        batch.Y(n) = checked(Y[example], net.V, "Target");
    });
  }
};

// The loss of each minibatch, and what `emit` makes of the gradients.
template <typename T, typename Emit, typename Acc = accumulate_t<T>>
__global__ void __launch_bounds__(kThreadsOfNetwork<Acc>, 1)
    run_network(Sizes sizes, Parameters<T> parameters, ChannelVector<T> running_mean, ChannelVector<T> running_var,
                Norm<Acc> norm, Examples examples, Emit emit, Acc* losses) {
  const Network<Acc> net(sizes, dynamic_memory());
  parameters.for_each(net, [](const Given<T>& given, Strided<Acc> place) {
#pragma unroll 4
    for (int i = threadIdx.x; i < given.size(); i += blockDim.x)
      place(i / given.columns, i % given.columns) = widen(given.at(i));
  });
  for_each(net.H, [&](int j) {
    net.running_mean[j] = running_mean.get(j);
    net.running_var[j] = running_var.get(j);
  });
  examples.take(0, net);
  __syncthreads();

  for (int64_t k = 0; k < examples.K; ++k) {
    const Minibatch batch = net.minibatch(k);
    embed(net, batch);
    __syncthreads();
    make_hprebn(net);
    __syncthreads();
    make_statistics(net, norm);
    __syncthreads();
    make_h(net);
    __syncthreads();
    make_logits(net);
    __syncthreads();
    make_losses(net, batch);
    __syncthreads();
    write_mean_loss(net, losses + k);
    if (!emit.wanted()) continue;  // of a single minibatch
    make_dhpreact(net);
    __syncthreads();
    make_dW2_and_db2(net, emit);
    make_dhprebn(net, norm, emit);
    examples.take(k + 1, net);
    __syncthreads();
    make_dembcat(net);
    __syncthreads();
    make_dW1_and_dC(net, batch, emit);
    __syncthreads();
  }

  if constexpr (Emit::kMovesParameters)
    parameters.for_each(net, [](const Given<T>& given, Strided<Acc> place) {
      for (int i = threadIdx.x; i < given.size(); i += blockDim.x)
        given.at(i) = narrow<T>(place(i / given.columns, i % given.columns));
    });
  if (norm.training)
    for_each(net.H, [&](int j) {
      if (running_mean) running_mean.set(j, net.running_mean[j]);
      if (running_var) running_var.set(j, net.running_var[j]);
    });
}

// All that the two ops have in common.
struct Call {
  Tensor X, Y, C, W1, b1, bngain, bnbias, W2, b2;
  std::optional<Tensor> running_mean, running_var;
  bool training;
  double momentum, eps;

  Sizes sizes(int64_t N) const {
    STD_TORCH_CHECK(X.dim() == 2 && X.scalar_type() == ScalarType::Long, "mlp: X should be (N, T), int64");
    check_vector(Y, X.size(0), ScalarType::Long, "Y");
    STD_TORCH_CHECK(C.dim() == 2 && W1.dim() == 2, "mlp: C should be (V, E), and W1 (H, F)");
    STD_TORCH_CHECK(N > 0 && X.size(0) > 0, "mlp: expected at least one example");
    STD_TORCH_CHECK(training || (running_mean && running_var), "mlp: evaluation needs running statistics");
    check_same_device(X, C, "X");
    check_same_device(Y, C, "Y");
    return {N, X.size(1), C.size(1), W1.size(0), C.size(0)};
  }

  int64_t bytes(const Sizes& s) const {
    const bool is_double = C.scalar_type() == ScalarType::Double;
    return is_double ? Network<double>(s, nullptr).bytes : Network<float>(s, nullptr).bytes;
  }

  // Whether a block of the device has so much shared memory.
  bool fits(const Sizes& s) const {
    int most = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, C.get_device_index()));
    return bytes(s) <= most;
  }

  template <typename T, typename Emit>
  void run(const Sizes& s, const std::optional<Tensor>& ix, const Emit& emit, accumulate_t<T>* losses) const {
    using Acc = accumulate_t<T>;
    constexpr bool kWritten = Emit::kMovesParameters;
    const auto vector = [&](const Tensor& t, int64_t size, const char* name) {
      return Given<T>(t, 1, size, C, kWritten, name);
    };
    const Parameters<T> parameters{Given<T>(C, s.V, s.E, C, kWritten, "C"),
                                   Given<T>(W1, s.H, s.T * s.E, C, kWritten, "W1"),
                                   vector(b1, s.H, "b1"),
                                   vector(bngain, s.H, "bngain"),
                                   vector(bnbias, s.H, "bnbias"),
                                   Given<T>(W2, s.V, s.H, C, kWritten, "W2"),
                                   vector(b2, s.V, "b2")};
    const Tensor X_c = as_contiguous(X), Y_c = as_contiguous(Y);
    const Examples examples{X_c.const_data_ptr<int64_t>(), Y_c.const_data_ptr<int64_t>(), data_or_null<int64_t>(ix),
                            X.size(0), ix ? ix->size(0) : 1};
    launch(C, {1, kThreadsOfNetwork<Acc>, bytes(s)}, run_network<T, Emit>, s, parameters,
           ChannelVector<T>(running_mean, W2, "running_mean", training),
           ChannelVector<T>(running_var, W2, "running_var", training),
           Norm<Acc>{training, static_cast<Acc>(momentum), static_cast<Acc>(eps)}, examples, emit, losses);
    for (const auto& running : {running_mean, running_var})
      if (running && training) copy_back(*running, *running);
    if constexpr (kWritten) {
      for (const Tensor& p : {C, W1, b1, bngain, bnbias, W2, b2}) copy_back(p, p);
    }
  }
};

// Calls the reference by the name that fused_ops/ops/mlp.py gives it for this; returns its outputs.
template <typename... Args>
std::array<StableIValue, sizeof...(Args)> call_reference(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

}  // namespace

std::tuple<Tensor, Tensor> mlp_loss_and_gradients(Tensor X, Tensor Y, Tensor C, Tensor W1, Tensor b1, Tensor bngain,
                                                  Tensor bnbias, Tensor W2, Tensor b2,
                                                  std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                                  bool training, double momentum, double eps, bool needs_gradients) {
  const Call call{X, Y, C, W1, b1, bngain, bnbias, W2, b2, running_mean, running_var, training, momentum, eps};
  const Sizes sizes = call.sizes(X.size(0));
  if (!call.fits(sizes)) {
    const auto outputs =
        call_reference("fused_ops::mlp_loss_and_gradients_by_reference", X, Y, C, W1, b1, bngain, bnbias, W2, b2,
                       running_mean, running_var, training, momentum, eps, needs_gradients);
    return {torch::stable::detail::to<Tensor>(outputs[0]), torch::stable::detail::to<Tensor>(outputs[1])};
  }
  int64_t count = 0;
  for (const Tensor& p : {C, W1, b1, bngain, bnbias, W2, b2}) count += p.numel();
  const auto type = accumulate_type(C.scalar_type());
  Tensor loss = empty_beside(C, {}, type), gradients = empty_beside(C, {needs_gradients ? count : 0}, type);
  dispatch_floating(C.scalar_type(), "mlp", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const Write<Acc> write{needs_gradients ? gradients.mutable_data_ptr<Acc>() : nullptr};
    call.run<T>(sizes, std::nullopt, write, loss.mutable_data_ptr<Acc>());
  });
  return {loss, gradients};
}

Tensor mlp_sgd_steps_(Tensor X, Tensor Y, Tensor ix, Tensor C, Tensor W1, Tensor b1, Tensor bngain, Tensor bnbias,
                      Tensor W2, Tensor b2, Tensor running_mean, Tensor running_var, double lr, double momentum,
                      double eps) {
  const Call call{X, Y, C, W1, b1, bngain, bnbias, W2, b2, running_mean, running_var, true, momentum, eps};
  STD_TORCH_CHECK(ix.dim() == 2 && ix.scalar_type() == ScalarType::Long, "mlp: ix should be (K, N), int64");
  check_same_device(ix, C, "ix");
  const Sizes sizes = call.sizes(ix.size(1));
  if (!call.fits(sizes)) {
    const auto outputs = call_reference("fused_ops::mlp_sgd_steps__by_reference", X, Y, ix, C, W1, b1, bngain, bnbias,
                                        W2, b2, running_mean, running_var, lr, momentum, eps);
    return torch::stable::detail::to<Tensor>(outputs[0]);
  }
  Tensor losses = empty_beside(C, {ix.size(0)}, accumulate_type(C.scalar_type()));
  dispatch_floating(C.scalar_type(), "mlp", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    call.run<T>(sizes, as_contiguous(ix), Descend<Acc>{static_cast<Acc>(lr)}, losses.mutable_data_ptr<Acc>());
  });
  return losses;
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CUDA, m) {
  m.impl("mlp_loss_and_gradients", TORCH_BOX(&fused_ops::mlp_loss_and_gradients));
  m.impl("mlp_sgd_steps_", TORCH_BOX(&fused_ops::mlp_sgd_steps_));
}
