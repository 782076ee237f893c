// Cross-entropy. Derivation and names: fused_ops/ops/cross_entropy.py.
//
// A row is read from memory once: while it is in cache its maximum is found, and then its exponentials, of which both
// the loss and, from a buffer that stays there, the gradient are made: of several rows at a time, which are blocks.
// Rows are independent, and it does not matter to them how they are taken together, so the result does not depend on
// the number of threads.
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cross_entropy_loss.h"
#include "huge_pages.h"

namespace fused_ops {
namespace {

constexpr int64_t kLongRow = 128;      // so many classes are worth the merging of lanes
constexpr int64_t kFewRows = 16;       // side by side, if less: a vector's lanes are more
constexpr int64_t kBufferSize = 4096;  // of the rows that make a block: so many elements stay in a near cache
constexpr int64_t kStackSteps = 256;   // of a task's scratch, up to which it is on its stack

// Without branches, so that compilers vectorise a loop over it.
inline bool out_of_bounds(int64_t y, int64_t C, int64_t ignore_index) {
  return ((y < 0) | (y >= C)) & (y != ignore_index);
}

FUSED_OPS_VECTORIZED bool any_out_of_bounds(const int64_t* y, int64_t R, int64_t C, int64_t ignore_index) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t r = 0; r < R; ++r) count += out_of_bounds(y[r], C, ignore_index);
  return count > 0;
}

// Throws where a target is out of bounds: later, inside parallel_for, nothing may.
void check_targets(const Rows& rows) {
  if (rows.probabilities) return;
  const int64_t* y = rows.target.const_data_ptr<int64_t>();
  if (!any_out_of_bounds(y, rows.R, rows.C, rows.ignore_index)) return;
  for (int64_t r = 0; r < rows.R; ++r)
    if (out_of_bounds(y[r], rows.C, rows.ignore_index))
      throw std::out_of_range("Target " + std::to_string(y[r]) + " is out of bounds.");
}

// Σ value(r) over all rows, in double and in an order that does not depend on the number of threads.
template <typename Value>
double sum_of_rows(int64_t R, const Value& value) {
  constexpr int64_t kSums = 16;  // at once, since each waits for its last addition
  double sums[kSums] = {};
  for (int64_t r = 0; r < R; r += kSums)
    for (int64_t i = 0; i < std::min(kSums, R - r); ++i) sums[i] += value(r + i);
  return std::accumulate(sums, sums + kSums, 0.0);
}

// f(place in memory, place side by side) of every element of rows from r on, wherever they lie.
template <typename F>
void for_places(const Rows& rows, int64_t r, int64_t count, const F& f) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = rows.start(r + i);
    if (rows.D == 1) {  // known to the compiler
#pragma GCC unroll 8
      for (int64_t c = 0; c < rows.C; ++c) f(start + c, c * kLanes + i);
    } else {
      for (int64_t c = 0; c < rows.C; ++c) f(start + c * rows.D, c * kLanes + i);
    }
  }
}

// Copies rows from r on side by side; and back.
template <typename T>
void gather(const Rows& rows, int64_t r, int64_t count, const T* x, T* side_by_side) {
  for_places(rows, r, count, [=](int64_t place, int64_t beside) { side_by_side[beside] = x[place]; });
}

template <typename T>
void scatter(const Rows& rows, int64_t r, int64_t count, const T* side_by_side, T* x) {
  for_places(rows, r, count, [=](int64_t place, int64_t beside) { x[place] = side_by_side[beside]; });
}

// Calls f(task, so many steps of scratch) in parallel.
template <typename Acc, typename F>
void in_tasks(int64_t tasks, int64_t steps, const F& f) {
  // Small scratch is on the stack: for a block of 1 KiB or more malloc tidies up what it keeps for small ones.
  const bool on_stack = steps <= kStackSteps;
  const std::unique_ptr<Step<Acc>[]> scratch(on_stack ? nullptr : new Step<Acc>[tasks * steps]);
  parallel_for(0, tasks, 1, [&](int64_t task, int64_t) {
    Step<Acc> stack[kStackSteps];
    f(task, on_stack ? stack : scratch.get() + task * steps);
  });
}

// Rows one after another, a few of which are a block: f.blocks(block, a function that takes full ones and returns the
// first row of each, all elements, a buffer for the steps of two), and for the rows that are left f.block as below.
template <typename T, typename F>
void for_long_rows(const Rows& rows, int64_t tasks, const Elements<T>& all, const F& f) {
  using Acc = accumulate_t<T>;
  const int64_t C = rows.C, R = rows.R;
  const int64_t at_once = std::clamp<int64_t>(kBufferSize / (ceil_div(C, kLanes) * kLanes), 1, kLanes);
  const Block<false> full{C, at_once, 1}, rest{C, R % at_once, 1};
  const int64_t first_of_rest = R - rest.rows;
  Shares shares(first_of_rest, at_once, tasks);

  in_tasks<Acc>(tasks, 2 * at_once * full.steps(), [&](int64_t task, Step<Acc>* scratch) {
    f.blocks(full, shares.taker(task), all, scratch->lanes);
    if (rest.rows && task == 0) f.block(rest, first_of_rest, all.from(rows.start(first_of_rest)), scratch->lanes);
  });
}

// Rows that lie side by side, or are gathered to do so: f.block(block, its first row, its elements, a buffer for its
// steps).
template <typename T, typename F>
void for_rows_side_by_side(const Rows& rows, int64_t tasks, const Elements<T>& all, const F& f) {
  using Acc = accumulate_t<T>;
  const int64_t C = rows.C, D = rows.D, R = rows.R;
  // A row that is gathered has an element in each line of those beside it, which should still be in cache for these.
  const bool gathered = D < kFewRows && C * D <= kBufferSize;
  const int64_t gatherings = gathered ? (all.y ? 4 : 2) : 0;  // x, dx, y, dy
  const int64_t at_once = gathered ? kLanes : std::min(D, kLanes);
  const int64_t of_piece = ceil_div(kBufferSize, std::max<int64_t>(1, C) * at_once) * at_once;
  Shares shares(R, of_piece, tasks);

  in_tasks<Acc>(tasks, C * (1 + gatherings), [&](int64_t task, Step<Acc>* scratch) {
    const auto gathering = [&](int64_t i, bool needed) {
      return gathered && needed ? reinterpret_cast<T*>(scratch[i * C].lanes) : nullptr;
    };
    T *x = gathering(1, true), *dx = gathering(2, all.dx), *y = gathering(3, all.y), *dy = gathering(4, all.dy);
    const Elements<T> in_cache{x, y, dx, dy};
    Acc* buffer = scratch->lanes;
    auto take = shares.taker(task);
    while (const auto first = take()) {
      const int64_t end = std::min(R, *first + of_piece);
      for (int64_t r = *first, count; r < end; r += count) {
        if (gathered) {
          count = std::min(at_once, end - r);
          gather(rows, r, count, all.x, x);
          if (all.y) gather(rows, r, count, all.y, y);
          f.block(Block<true>{C, count, kLanes}, r, in_cache, buffer);
          if (all.dx) scatter(rows, r, count, dx, all.dx);
          if (all.dy) scatter(rows, r, count, dy, all.dy);
        } else {
          count = std::min({at_once, D - r % D, end - r});
          f.block(Block<true>{C, count, D}, r, all.from(rows.start(r)), buffer);
        }
      }
    }
  });
}

// f of all rows, in blocks.
template <typename T, typename F>
void for_each_block(const Rows& rows, const Elements<T>& all, const F& f) {
  const bool long_rows = rows.D == 1 && rows.C >= kLongRow;
  // Short rows take twice as long: most are gathered.
  const int64_t of_task = long_rows ? kElementsPerTask : kElementsPerTask / 2;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks = std::clamp<int64_t>(ceil_div(rows.R * rows.C, of_task), 1, threads);
  if (long_rows)
    for_long_rows<T>(rows, tasks, all, f);
  else
    for_rows_side_by_side<T>(rows, tasks, all, f);
}

// Calls f with the BlockLoss of the rows.
template <typename T, typename F>
void dispatch_blocks(const Rows& rows, const F& f) {
  dispatch_forms<T>(
      rows, [&](auto cap, auto targets) { f(BlockLoss<T, decltype(cap), decltype(targets)>(rows, cap, targets)); });
}

template <typename T>
const T* probabilities_or_null(const Rows& rows) {
  return rows.probabilities ? rows.target.const_data_ptr<T>() : nullptr;
}

// pass.block of each block that `take` returns the first row of.
template <typename Pass, typename Take, typename T>
void one_by_one(const Pass& pass, const Block<false>& block, Take take, const Elements<T>& all,
                accumulate_t<T>* buffer) {
  while (const auto r = take()) pass.block(block, *r, all.from(block.start(*r)), buffer);
}

// The gradients of rows from dlosses, m and log_z.
template <typename T, typename Loss>
struct BackwardPass {
  using Acc = accumulate_t<T>;
  const Loss& loss;
  const Acc *m, *log_z, *dlosses;
  Acc divisor;
  bool per_row;

  template <typename B>
  void block(const B& block, int64_t r, const Elements<T>& at, Acc* buffer) const {
    RowValues<Acc> row;
    for (int64_t i = 0; i < block.rows; ++i) {
      row.m[i] = usual_nan(m[r + i]);
      row.log_z[i] = log_z[r + i];
      row.g[i] = dlosses[per_row ? r + i : 0] / divisor;
    }
    loss.backward(block, r, at, row, buffer);
  }

  template <typename Take>
  void blocks(const Block<false>& of, Take take, const Elements<T>& all, Acc* buffer) const {
    one_by_one(*this, of, take, all, buffer);
  }
};

// The losses of rows; and m and log_z, where not null, or the gradients for dloss = 1, of which each row has g.
template <typename T, typename Loss>
struct ForwardPass {
  using Acc = accumulate_t<T>;
  const Loss& loss;
  Acc g, *losses, *m, *log_z;

  template <typename B>
  void block(const B& block, int64_t r, const Elements<T>& at, Acc* buffer) const {
    RowValues<Acc> row;
    std::fill_n(row.g, block.rows, g);
    loss.forward(block, r, at, row, buffer, losses + r);
    if (!m) return;
    std::copy_n(row.m, block.rows, m + r);
    std::copy_n(row.log_z, block.rows, log_z + r);
  }

  template <typename Take>
  void blocks(const Block<false>& of, Take take, const Elements<T>& all, Acc* buffer) const {
    if constexpr (Loss::kInOneSweep)  // but for rows that leave the cache, which wait for memory in any case
      if (all.dx && of.rows > 1) return loss.forward_in_one_sweep(of, take, all, g, buffer, losses);
    one_by_one(*this, of, take, all, buffer);
  }
};

// The gradient of every row, dx (which may be the logits themselves) and dy, where not null.
template <typename T>
void row_gradients(const Rows& rows, const RowGradients& gradients, T* dx, T* dy) {
  using Acc = accumulate_t<T>;
  const Acc *m = gradients.stats.const_data_ptr<Acc>(), *dlosses = gradients.dlosses.const_data_ptr<Acc>();
  const Acc divisor = rows.mean ? *gradients.divisor.const_data_ptr<Acc>() : Acc(1);
  const Elements<T> all{rows.logits.const_data_ptr<T>(), probabilities_or_null<T>(rows), dx, dy};
  dispatch_blocks<T>(rows, [&](const auto& loss) {
    using Loss = std::decay_t<decltype(loss)>;
    for_each_block<T>(rows, all, BackwardPass<T, Loss>{loss, m, m + rows.R, dlosses, divisor, rows.per_row});
  });
}

// The loss, in the accumulate type or that of the logits; and what the backward pass needs, (m, log_z) and the mean's
// divisor, and the gradient, where not null.
Tensor loss_of_rows(const Rows& rows, bool narrowed, Tensor* stats, Tensor* divisor, Tensor* dlogits) {
  const int64_t R = rows.R;
  const auto type = rows.logits.scalar_type(), loss_type = narrowed ? type : accumulate_type(type);
  Tensor loss = rows.per_row ? empty_beside(rows.logits, {R}, loss_type) : empty_beside(rows.logits, {}, loss_type);
  dispatch_floating(type, "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const Classes<Acc> classes(rows);
    Acc* m = stats ? stats->mutable_data_ptr<Acc>() : nullptr;
    std::vector<Acc> losses(R);

    const double kept_weight =
        sum_of_rows(R, [&](int64_t r) { return classes.ignored(r) ? 0 : static_cast<double>(classes.weight(r)); });
    if (divisor) *divisor->mutable_data_ptr<Acc>() = static_cast<Acc>(kept_weight);
    const Acc g = 1 / (rows.mean ? static_cast<Acc>(kept_weight) : Acc(1));

    const Elements<T> all{rows.logits.template const_data_ptr<T>(), probabilities_or_null<T>(rows),
                          dlogits ? data_or_null<T>(*dlogits) : nullptr, nullptr};
    dispatch_blocks<T>(rows, [&](const auto& loss) {
      using Loss = std::decay_t<decltype(loss)>;
      for_each_block<T>(rows, all, ForwardPass<T, Loss>{loss, g, losses.data(), m, m ? m + R : nullptr});
    });

    if (!rows.per_row) {
      const double sum = sum_of_rows(R, [&](int64_t r) { return static_cast<double>(losses[r]); });
      losses = {static_cast<Acc>(rows.mean ? sum / kept_weight : sum)};
    }
    if (loss_type == type)
      std::transform(losses.begin(), losses.end(), loss.mutable_data_ptr<T>(), narrow<T>);
    else
      std::copy(losses.begin(), losses.end(), loss.mutable_data_ptr<Acc>());
  });
  return loss;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                         int64_t ignore_index, Name reduction, double label_smoothing,
                                                         double z_loss, std::optional<double> softcap) {
  const Rows rows(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  check_targets(rows);
  const auto acc_type = accumulate_type(logits.scalar_type());
  Tensor stats = empty_beside(logits, {2, rows.R}, acc_type);
  Tensor divisor = empty_beside(logits, {}, acc_type);
  return {loss_of_rows(rows, false, &stats, &divisor, nullptr), stats, divisor};
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                       int64_t ignore_index, Name reduction, double label_smoothing,
                                                       double z_loss, std::optional<double> softcap, bool narrowed) {
  const Rows rows(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  check_targets(rows);
  Tensor dlogits = on_huge_pages(gradient_or_nothing(rows, true));
  return {loss_of_rows(rows, narrowed, nullptr, nullptr, &dlogits), dlogits};
}

void cross_entropy_scale_(Tensor dlogits, Tensor dloss, Tensor target, int64_t ignore_index) {
  STD_TORCH_CHECK(dlogits.is_contiguous() && dloss.numel() == 1, "dlogits should be contiguous, dloss one element");
  const Rows rows(dlogits, target, std::nullopt, ignore_index, "mean", 0, 0, std::nullopt);
  const auto type = dlogits.scalar_type();
  dispatch_floating(type, "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    using Acc = accumulate_t<T>;
    const Acc g = dloss.scalar_type() == type ? widen(*dloss.const_data_ptr<T>())
                                              : *as_type(dloss, accumulate_type(type)).template const_data_ptr<Acc>();
    T* dx = dlogits.mutable_data_ptr<T>();
    parallel_for(0, rows.R * rows.C, kElementsPerTask,
                 [&](int64_t begin, int64_t end) { multiply(dx + begin, end - begin, g); });
    if (std::isfinite(g)) return;
    const Classes<Acc> classes(rows);
    for (int64_t r = 0; r < rows.R; ++r)
      for (int64_t c = 0; classes.ignored(r) && c < rows.C; ++c) dx[rows.start(r) + c * rows.D] = T(0);  // 0·inf is not
  });
}

std::tuple<Tensor, Tensor> cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target,
                                                  std::optional<Tensor> weight, Tensor stats, Tensor divisor,
                                                  int64_t ignore_index, Name reduction, double label_smoothing,
                                                  double z_loss, std::optional<double> softcap, bool needs_logits,
                                                  bool needs_target) {
  const Rows rows(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  check_targets(rows);
  const RowGradients gradients(rows, dloss, stats, divisor);
  Tensor dlogits = on_huge_pages(gradient_or_nothing(rows, needs_logits));
  Tensor dtarget = on_huge_pages(gradient_or_nothing(rows, needs_target && rows.probabilities));
  if (dlogits.numel() || dtarget.numel())
    dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
      using T = decltype(scalar);
      row_gradients<T>(rows, gradients, data_or_null<T>(dlogits), data_or_null<T>(dtarget));
    });
  return {dlogits, dtarget};
}

Tensor cross_entropy_backward_(Tensor dloss, Tensor logits, Tensor target, std::optional<Tensor> weight, Tensor stats,
                               Tensor divisor, int64_t ignore_index, Name reduction, double label_smoothing,
                               double z_loss, std::optional<double> softcap, bool needs_target) {
  STD_TORCH_CHECK(logits.is_contiguous(), "logits should be contiguous, to be written over");
  const Rows rows(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap);
  check_targets(rows);
  const RowGradients gradients(rows, dloss, stats, divisor);
  Tensor dtarget = on_huge_pages(gradient_or_nothing(rows, needs_target && rows.probabilities));
  dispatch_floating(logits.scalar_type(), "cross_entropy", [&](auto scalar) {
    using T = decltype(scalar);
    row_gradients<T>(rows, gradients, logits.mutable_data_ptr<T>(), data_or_null<T>(dtarget));
  });
  return dtarget;
}

}  // namespace fused_ops

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fused_ops::cross_entropy_forward));
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&fused_ops::cross_entropy_with_gradient));
  m.impl("cross_entropy_scale_", TORCH_BOX(&fused_ops::cross_entropy_scale_));
  m.impl("cross_entropy_backward", TORCH_BOX(&fused_ops::cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&fused_ops::cross_entropy_backward_));
}
