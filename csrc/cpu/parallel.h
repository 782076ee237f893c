// Work that is shared out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

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

// Items that tasks have a share of each, the same in every call: what a task has written last time is in the cache of
// its processor. It takes parts of it, and then of what the others have left, so one that starts late, or whose
// processor is busy, does less, and one alone would do it all. The parts get smaller, so that all end together.
class Shares {
 public:
  // Parts are multiples of so many items at once, but for the last.
  Shares(int64_t items, int64_t at_once, int64_t tasks) : at_once_(at_once), shares_(tasks) {
    const int64_t of_each = ceil_div(items, tasks * at_once) * at_once;
    for (int64_t task = 0; task < tasks; ++task) {
      shares_[task].next = std::min(items, task * of_each);
      shares_[task].end = std::min(items, (task + 1) * of_each);
    }
  }

  // f(begin, end) for every part that this task takes.
  template <typename F>
  void take_parts(int64_t task, const F& f) {
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(task + i) % shares_.size()];
      for (int64_t begin = share.next; begin < share.end;) {
        const int64_t end = std::min(share.end, begin + ceil_div(share.end - begin, kParts * at_once_) * at_once_);
        if (!share.next.compare_exchange_weak(begin, end))
          continue;  // begin is now where another has taken a part from
        f(begin, end);
        begin = share.next;
      }
    }
  }

 private:
  static constexpr int64_t kParts = 4;  // of what is left of a share

  struct Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  int64_t at_once_;
  std::vector<Share> shares_;
};

}  // namespace fused_ops
