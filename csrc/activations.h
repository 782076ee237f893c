// The activations, each with its derivative, for host and device. Derivations: fused_ops/ops/_activations.py.
//
// Those of float have no branches or calls, so that compilers vectorise loops over them. All keep NaN. kCheap: z takes
// less time to work out again, derivative and all, than to be kept in memory.
#pragma once

#include <string>

#include "numeric.h"

namespace fused_ops {

// No activation: whoever needs its derivative, 1, leaves the factor out.
struct Identity {
  static constexpr bool kCheap = true;
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc value(Acc z) {
    return z;
  }
};

struct Relu {
  static constexpr bool kCheap = true;
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc value(Acc z) {
    return z <= 0 ? 0 : z;
  }
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc derivative(Acc z) {
    return z <= 0 ? 0 : 1;
  }
};

struct LeakyRelu {
  static constexpr bool kCheap = true;
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc value(Acc z) {
    return z * derivative(z);
  }
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc derivative(Acc z) {
    return z > 0 ? 1 : static_cast<Acc>(0.01);
  }
};

struct Tanh {
  static constexpr bool kCheap = false;
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc value(Acc z) {
    return tanh(z);
  }
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc derivative(Acc z) {
    const Acc y = tanh(z);
    return 1 - y * y;
  }
};

struct Gelu {
  static constexpr bool kCheap = false;
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc value(Acc z) {
    return z * normal_distribution(z, exp(static_cast<Acc>(-0.5) * z * z));
  }
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc derivative(Acc z) {
    const Acc e = exp(static_cast<Acc>(-0.5) * z * z);
    return normal_distribution(z, e) + z * (static_cast<Acc>(0.39894228040143268) * e);  // 1/√(2π)
  }
};

struct Silu {
  static constexpr bool kCheap = false;
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc sigmoid(Acc z) {
    return 1 / (1 + exp(-z));
  }
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc value(Acc z) {
    return z * sigmoid(z);
  }
  template <typename Acc>
  FUSED_OPS_HOST_DEVICE static Acc derivative(Acc z) {
    const Acc s = sigmoid(z);
    return s * (1 + z * (1 - s));
  }
};

// Calls f(A{}) with the activation A of this name; returns whether there is one.
template <typename F>
bool dispatch_activation(const std::string& name, const F& f) {
  if (name == "relu") return f(Relu{}), true;
  if (name == "leaky_relu") return f(LeakyRelu{}), true;
  if (name == "tanh") return f(Tanh{}), true;
  if (name == "gelu") return f(Gelu{}), true;
  if (name == "silu") return f(Silu{}), true;
  return false;
}

}  // namespace fused_ops
