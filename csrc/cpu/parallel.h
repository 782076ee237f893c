// Work that is shared out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace fused_ops {

// Work items of about this many elements each are worth handing to another thread.
constexpr int64_t kElementsPerTask = 32768;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(begin, end) for ranges of at least `grain` items, in PyTorch's threads. What is one range is done at once: PyTorch
// would do the same, but the way there takes as long as a small op's arithmetic.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end - begin > grain)
    torch::stable::parallel_for(begin, end, grain, f);
  else if (begin < end)
    f(begin, end);
}

}  // namespace fused_ops
