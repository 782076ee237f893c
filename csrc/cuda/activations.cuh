// Activations that are chosen on the device.
#pragma once

#include <cuda_runtime.h>

#include <optional>

#include "../activations.h"
#include "../checks.h"
#include "../name.h"

namespace fused_ops {

// By a branch that all threads take alike, so that one kernel has them all.
enum class Activation { kNone, kRelu, kLeakyRelu, kTanh, kGelu, kSilu };

inline Activation number_of(Relu) { return Activation::kRelu; }
inline Activation number_of(LeakyRelu) { return Activation::kLeakyRelu; }
inline Activation number_of(Tanh) { return Activation::kTanh; }
inline Activation number_of(Gelu) { return Activation::kGelu; }
inline Activation number_of(Silu) { return Activation::kSilu; }

inline Activation activation_of(const std::optional<Name>& name) {
  auto activation = Activation::kNone;
  const bool known = !name || dispatch_activation(*name, [&](auto a) { activation = number_of(a); });
  STD_TORCH_CHECK(known, "there is no activation ", *name);
  return activation;
}

// Calls f(A{}) with the activation A, if there is one.
template <typename F>
__device__ void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return f(Relu{});
    case Activation::kLeakyRelu:
      return f(LeakyRelu{});
    case Activation::kTanh:
      return f(Tanh{});
    case Activation::kGelu:
      return f(Gelu{});
    case Activation::kSilu:
      return f(Silu{});
  }
}

}  // namespace fused_ops
