// Uninitialised tensors. By way of PyTorch's dispatcher (torch::stable::empty) one would take longer than a small op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <array>
#include <initializer_list>

#include "checks.h"

namespace fused_ops {

// On the device of another tensor.
inline Tensor empty_strided(const Tensor& beside, int64_t dim, const int64_t* sizes, const int64_t* strides,
                            ScalarType type) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &device_type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(type), device_type,
                                                  beside.get_device_index(), &made));
  return Tensor(made);
}

// Contiguous, of at most three dimensions.
inline Tensor empty_beside(const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType type) {
  std::array<int64_t, 3> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes.begin()[i])) strides.at(i) = stride;
  return empty_strided(t, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), type);
}

// Like a dense tensor, or (0,) where it is not needed.
inline Tensor empty_like_dense(const Tensor& x, bool needed = true) {
  if (!needed) return empty_beside(x, {0}, x.scalar_type());
  return empty_strided(x, x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type());
}

}  // namespace fused_ops
