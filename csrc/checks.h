// Preconditions, dispatch on dtype, and the few tensor helpers that every kernel uses.
//
// The public functions check what a user can get wrong. What is checked here keeps a direct call of an op from reading
// or writing out of bounds. Nothing may throw inside parallel_for: check before the loop.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "numeric.h"

namespace fused_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(T{}) with the C++ type of a floating-point dtype.
template <typename F>
void dispatch_floating(ScalarType type, const char* op, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(c10::Half{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, float16 or bfloat16");
  }
}

inline void check_vector(const Tensor& v, int64_t size, ScalarType type, const char* name) {
  STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == size && v.scalar_type() == type, name, " should be a vector of ", size,
                  " elements of the right dtype");
}

inline void check_same_device(const Tensor& t, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(),
                  "Expected all tensors to be on the same device, but ", name, " is on another one");
}

// The values of an optional tensor, or null.
template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// torch::stable's functions look their op up by its name at every call, which takes longer than a small batch: these
// call it only where there is something to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// A vector of so many elements beside `beside`, in the accumulate type of that, without gaps; v itself where it is so.
inline Tensor accumulated_vector(const Tensor& v, int64_t size, const Tensor& beside, const char* name) {
  const auto type = accumulate_type(beside.scalar_type());
  const Tensor vector = as_contiguous(as_type(v, type));
  check_vector(vector, size, type, name);
  check_same_device(vector, beside, name);
  return vector;
}

inline std::optional<Tensor> accumulated_vector(const std::optional<Tensor>& v, int64_t size, const Tensor& beside,
                                                const char* name) {
  return v ? std::optional<Tensor>(accumulated_vector(*v, size, beside, name)) : std::nullopt;
}

// The new values of t, which lie in `values`, or in t itself. Through PyTorch's copy_ in any case: it takes any strides
// and dtype, and tells autograd that the values are new.
inline void copy_back(const Tensor& t, const Tensor& values) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(t.get(), values.get(), /*non_blocking=*/0));
}

}  // namespace fused_ops
