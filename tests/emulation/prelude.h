// Included before a CUDA source that is compiled as C++: PyTorch's headers, and then what is another thing without
// CUDA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

#define __CUDA_ARCH__ 900

// The kernels take tensors of the CPU.
#define CUDA CPU
#define accelerator no_accelerator
namespace torch::stable::no_accelerator {
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
}  // namespace torch::stable::no_accelerator
#define aoti_torch_get_current_cuda_stream(device, stream) AOTI_TORCH_SUCCESS

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call)                                                                      \
  do {                                                                                            \
    const cudaError_t error = call;                                                               \
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA error ", static_cast<int>(error), ": ",           \
                    error == cudaErrorLaunchFailure ? emulation::message : "it does not launch"); \
  } while (0)

// An op begins: what memory its kernels may touch is that of the tensors it asks for theirs.
namespace emulation {
template <auto boxed>
void begin(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  forget_tensors();
  boxed(stack, arguments, outputs);
}
}  // namespace emulation

#undef TORCH_BOX
#define TORCH_BOX(function)                                                                                         \
  emulation::begin<torch::stable::detail::boxer<std::remove_pointer_t<std::remove_reference_t<decltype(function)>>, \
                                                (function)>::boxed_fn>
