// The functions of csrc/numeric.h in loops as the kernels', for tests/test_numeric.py to compile and call.
#include "../csrc/numeric.h"

#include "../csrc/cpu/vectorize.h"

using namespace fused_ops;

#define LOOP(name, From, To, value)                                                            \
  extern "C" __attribute__((visibility("default"))) FUSED_OPS_VECTORIZED void name##_of_array( \
      const From* __restrict array, To* __restrict result, int64_t size) {                     \
    for (int64_t i = 0; i < size; ++i) {                                                       \
      const From x = array[i];                                                                 \
      result[i] = value;                                                                       \
    }                                                                                          \
  }

LOOP(exp, float, float, fused_ops::exp(x))
LOOP(exp_of_softmax, float, float, exp_of_softmax<float>(x))
LOOP(exp_of_softmax_16, float, float, exp_of_softmax<c10::BFloat16>(x))
LOOP(log, float, float, fused_ops::log(x))
LOOP(tanh, float, float, fused_ops::tanh(x))
LOOP(exp_of_double, double, double, fused_ops::exp(x))
LOOP(exp_of_softmax_of_double, double, double, exp_of_softmax<double>(x))
LOOP(tanh_of_double, double, double, fused_ops::tanh(x))
LOOP(normal_distribution, float, float, normal_distribution(x, fused_ops::exp(-0.5f * x * x)))
LOOP(widen_bfloat16, c10::BFloat16, float, widen(x))
LOOP(widen_float16, c10::Half, float, widen(x))
LOOP(narrow_bfloat16, float, c10::BFloat16, narrow<c10::BFloat16>(x))
LOOP(narrow_float16, float, c10::Half, narrow<c10::Half>(x))
LOOP(narrow_away_bfloat16, float, c10::BFloat16, narrow_away<c10::BFloat16>(x))
