// Work that is shared out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <optional>
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

// Items of which each of several tasks has a share, the same in every call: what a task has written last time is in the
// cache of its processor. It takes that, piece by piece, and then what the others have left, so one that starts late,
// or whose processor is busy, does less, and one alone would do it all.
class Shares {
 public:
  // A piece has so many items, but for the last of all.
  Shares(int64_t items, int64_t of_piece, int64_t tasks) : of_piece_(of_piece), shares_(tasks) {
    const int64_t pieces = ceil_div(items, of_piece);
    for (int64_t task = 0; task < tasks; ++task) {
      shares_[task].next = pieces * task / tasks;
      shares_[task].end = pieces * (task + 1) / tasks;
    }
  }

  // A function that takes a piece for this task and returns its first item, or nothing when all are taken.
  auto taker(int64_t task) {
    return [this, task, empty = size_t{0}]() mutable -> std::optional<int64_t> {
      for (; empty < shares_.size(); ++empty) {
        Share& share = shares_[(task + empty) % shares_.size()];
        const int64_t piece = share.next++;
        if (piece < share.end) return piece * of_piece_;
      }
      return std::nullopt;
    };
  }

 private:
  struct Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  int64_t of_piece_;
  std::vector<Share> shares_;
};

}  // namespace fused_ops
