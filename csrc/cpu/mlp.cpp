// The lecture's network in one call, and its training in another. Derivation and names: fused_ops/ops/mlp.py.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../checks.h"
#include "../empty.h"
#include "network.h"

namespace fused_ops {
namespace {

// A parameter in the network's memory: its rows are row_stride apart, and it is transposed beside the tensor or not.
template <typename Acc>
struct Place {
  Acc* data;
  int64_t rows, columns, row_stride;
  bool transposed;
};

template <typename Acc>
std::vector<Place<Acc>> places(const Network<Acc>& net, const Parameters<Acc>& p) {
  const auto [N, T, E, F, H, V] = net.s;
  return {{p.C, V, E, E, false},      {p.W1, F, H, net.H, true},  {p.b1, 1, H, H, false}, {p.bngain, 1, H, H, false},
          {p.bnbias, 1, H, H, false}, {p.W2, V, H, net.H, false}, {p.b2, 1, V, V, false}};
}

// Calls f(i, j) with the index of each element in a dense tensor and in the place.
template <typename Acc, typename F>
void for_elements(const Place<Acc>& place, const F& f) {
  for (int64_t row = 0; row < place.rows; ++row)
    for (int64_t column = 0; column < place.columns; ++column)
      f(place.transposed ? column * place.rows + row : row * place.columns + column, row * place.row_stride + column);
}

template <typename T, typename Acc>
void read_matrix(const T* from, const Place<Acc>& place) {
  for_elements(place, [&](int64_t i, int64_t j) { place.data[j] = widen(from[i]); });
}

template <typename T, typename Acc>
void write_matrix(const Place<Acc>& place, T* to) {
  for_elements(place, [&](int64_t i, int64_t j) { to[i] = narrow<T>(place.data[j]); });
}

// Reads a tensor of the place's size, of whatever floating dtype.
template <typename Acc>
void read(const Tensor& t, const Place<Acc>& place, const char* name) {
  STD_TORCH_CHECK(t.numel() == place.rows * place.columns, "mlp: ", name, " has the wrong number of elements");
  const Tensor dense = as_contiguous(t);
  dispatch_floating(t.scalar_type(), "mlp", [&](auto scalar) {
    using T = decltype(scalar);
    if constexpr (std::is_same_v<accumulate_t<T>, Acc>)
      read_matrix(dense.const_data_ptr<T>(), place);
    else
      STD_TORCH_CHECK(false, "mlp: ", name, " has another dtype than the other parameters");
  });
}

template <typename Acc>
void write(const Tensor& t, const Place<Acc>& place) {
  const Tensor dense = as_contiguous(t);
  dispatch_floating(t.scalar_type(), "mlp", [&](auto scalar) {
    using T = decltype(scalar);
    if constexpr (std::is_same_v<accumulate_t<T>, Acc>) write_matrix(place, dense.mutable_data_ptr<T>());
  });
  copy_back(t, dense);
}

constexpr const char* kNames[] = {"C", "W1", "b1", "bngain", "bnbias", "W2", "b2"};

// The parameters (C, W1, ...) as they are given, and all examples.
struct Inputs {
  Tensor X, Y;
  std::vector<Tensor> parameters;

  Sizes sizes(int64_t N) const {
    const Tensor &C = parameters[0], &W1 = parameters[1];
    STD_TORCH_CHECK(X.dim() == 2 && X.scalar_type() == ScalarType::Long, "mlp: X should be (N, T), int64");
    check_vector(Y, X.size(0), ScalarType::Long, "Y");
    STD_TORCH_CHECK(C.dim() == 2 && W1.dim() == 2, "mlp: C should be (V, E), and W1 (H, F)");
    STD_TORCH_CHECK(N > 0, "mlp: expected at least one example");
    return {N, X.size(1), C.size(1), X.size(1) * C.size(1), W1.size(0), C.size(0)};
  }
};

void check_index(int64_t index, int64_t size, const char* name) {
  if (index < 0 || index >= size)
    throw std::out_of_range(std::string(name) + " " + std::to_string(index) + " is out of bounds.");
}

// The elements of X and Y.
struct Examples {
  const int64_t *X, *Y;
  int64_t T;

  explicit Examples(const Inputs& inputs)
      : X(inputs.X.const_data_ptr<int64_t>()), Y(inputs.Y.const_data_ptr<int64_t>()), T(inputs.X.size(1)) {}

  void check(int64_t row, int64_t V) const {
    for (int64_t t = 0; t < T; ++t) check_index(X[row * T + t], V, "Index");
    check_index(Y[row], V, "Target");
  }

  // Makes example `row` the network's n-th.
  template <typename Acc>
  void take(int64_t row, Network<Acc>& net, int64_t n) const {
    for (int64_t t = 0; t < T; ++t) net.X[n * T + t] = X[row * T + t];
    net.Y[n] = Y[row];
  }
};

template <typename Acc>
void read_parameters(const Network<Acc>& net, const Inputs& inputs) {
  const auto to = places(net, net.p);
  for (size_t i = 0; i < to.size(); ++i) read(inputs.parameters[i], to[i], kNames[i]);
}

template <typename F>
void dispatch_accumulate(ScalarType type, const F& f) {
  accumulate_type(type) == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace

std::tuple<Tensor, Tensor> mlp_loss_and_gradients(Tensor X, Tensor Y, Tensor C, Tensor W1, Tensor b1, Tensor bngain,
                                                  Tensor bnbias, Tensor W2, Tensor b2,
                                                  std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                                  bool training, double momentum, double eps, bool needs_gradients) {
  const Inputs inputs{as_contiguous(X), as_contiguous(Y), {C, W1, b1, bngain, bnbias, W2, b2}};
  const Sizes s = inputs.sizes(X.size(0));
  const Examples examples(inputs);
  for (int64_t n = 0; n < s.N; ++n) examples.check(n, s.V);
  const auto type = accumulate_type(C.scalar_type());
  int64_t count = 0;
  for (const Tensor& p : inputs.parameters) count += p.numel();
  Tensor loss = empty_beside(C, {}, type);
  Tensor gradients = empty_beside(C, {needs_gradients ? count : 0}, type);
  dispatch_accumulate(type, [&](auto scalar) {
    using Acc = decltype(scalar);
    Network<Acc> net(s, training, momentum, eps);
    read_parameters(net, inputs);
    const Place<Acc> mean{net.running_mean, 1, s.H, s.H, false}, var{net.running_var, 1, s.H, s.H, false};
    if (running_mean) read(*running_mean, mean, "running_mean");
    if (running_var) read(*running_var, var, "running_var");
    for (int64_t n = 0; n < s.N; ++n) examples.take(n, net, n);

    *loss.mutable_data_ptr<Acc>() = run(net, needs_gradients);
    if (needs_gradients) {
      Acc* next = gradients.mutable_data_ptr<Acc>();
      for (const Place<Acc>& place : places(net, net.d)) {
        write_matrix(place, next);
        next += place.rows * place.columns;
      }
    }
    if (training && running_mean) write(*running_mean, mean);
    if (training && running_var) write(*running_var, var);
  });
  return {loss, gradients};
}

Tensor mlp_sgd_steps_(Tensor X, Tensor Y, Tensor ix, Tensor C, Tensor W1, Tensor b1, Tensor bngain, Tensor bnbias,
                      Tensor W2, Tensor b2, Tensor running_mean, Tensor running_var, double lr, double momentum,
                      double eps) {
  const Inputs inputs{as_contiguous(X), as_contiguous(Y), {C, W1, b1, bngain, bnbias, W2, b2}};
  STD_TORCH_CHECK(ix.dim() == 2 && ix.scalar_type() == ScalarType::Long, "mlp: ix should be (K, N), int64");
  const Sizes s = inputs.sizes(ix.size(1));
  const Tensor rows = as_contiguous(ix);
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t K = ix.size(0), M = X.size(0);
  const Examples examples(inputs);
  for (int64_t i = 0; i < K * s.N; ++i) {
    check_index(row[i], M, "Example");
    examples.check(row[i], s.V);
  }
  const auto type = accumulate_type(C.scalar_type());
  Tensor losses = empty_beside(C, {K}, type);
  dispatch_accumulate(type, [&](auto scalar) {
    using Acc = decltype(scalar);
    Network<Acc> net(s, true, momentum, eps);
    read_parameters(net, inputs);
    const Place<Acc> mean{net.running_mean, 1, s.H, s.H, false}, var{net.running_var, 1, s.H, s.H, false};
    read(running_mean, mean, "running_mean");
    read(running_var, var, "running_var");
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < s.N; ++n) examples.take(row[k * s.N + n], net, n);
      losses.mutable_data_ptr<Acc>()[k] = run(net, true);
      in_blocks(net.p.count, 4096, 1, [&](int64_t i, int64_t end) { descend(net, static_cast<Acc>(lr), i, end); });
    }
    const auto from = places(net, net.p);
    for (size_t i = 0; i < from.size(); ++i) write(inputs.parameters[i], from[i]);
    write(running_mean, mean);
    write(running_var, var);
  });
  return losses;
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("mlp_loss_and_gradients", TORCH_BOX(&fused_ops::mlp_loss_and_gradients));
  m.impl("mlp_sgd_steps_", TORCH_BOX(&fused_ops::mlp_sgd_steps_));
}
