// The loop of cross-entropy over the elements of a block: long rows of classes, one after another, or rows side by
// side.
//
// Both are steps of kLanes elements. One row is spread over the lanes, which are merged in the end. Rows side by side
// have a lane each, and their step k is the class k. So one loop serves logits of every shape, at the full width of the
// processor.
#pragma once

#include <algorithm>
#include <limits>

#include "../numeric.h"
#include "parallel.h"
#include "vectorize.h"

namespace fused_ops {

constexpr int64_t kLanes = 64;

// A value for each lane, or for each row of a block, of which there are at most as many.
template <typename Acc>
using Lanes = Acc[kLanes];

// Of a buffer: aligned, so that no vector lies in two cache lines.
template <typename Acc>
struct alignas(64) Step {
  Lanes<Acc> lanes;
};

// Of a step: where it lies in memory and in a buffer, and how many of its lanes hold what the step before has seen.
struct At {
  int64_t place, in_buffer, seen;
};

// Rows that are worked on together. They are groups: rows side by side, of which each has a lane, are one; of rows that
// lie one after another each is one, spread over the lanes.
template <bool kSideBySide_>
struct Block {
  static constexpr bool kSideBySide = kSideBySide_;
  int64_t C, rows, D;  // D is how far apart the classes of a row lie

  int64_t groups() const { return kSideBySide ? 1 : rows; }
  int64_t steps() const { return kSideBySide ? C : ceil_div(C, kLanes); }
  int64_t whole_steps() const { return kSideBySide ? (rows == kLanes ? C : 0) : C / kLanes; }
  int64_t step() const { return kSideBySide ? D : kLanes; }
  int64_t lanes(int64_t k) const { return kSideBySide ? rows : std::min(kLanes, C - k * kLanes); }
  int64_t class_of(At at, int64_t p) const { return kSideBySide ? at.in_buffer / kLanes : at.in_buffer + p; }
  int64_t place(int64_t row, int64_t c) const { return kSideBySide ? c * D + row : row * C + c; }  // in memory
  int64_t start(int64_t group) const { return group * C; }                                         // in memory
  int64_t first_step(int64_t group) const { return group * steps() * kLanes; }                     // in a buffer
};

// What every lane has of a value of the rows; of a row that is spread over the lanes all have the same, in a register.
template <typename B, typename Acc>
struct OfGroup {
  const Acc* of_rows;
  Acc of_row;

  OfGroup(B, const Acc* of_rows_, int64_t group) : of_rows(of_rows_), of_row(of_rows_[B::kSideBySide ? 0 : group]) {}

  Acc operator[](int64_t p) const { return B::kSideBySide ? of_rows[p] : of_row; }
};

// f(p) for kWidth lanes, if so many are left, and then for half as many: vectors to the last lane, or nearly.
template <int64_t kWidth, typename F>
inline void for_lanes_left(int64_t first, int64_t lanes, const F& f) {
  if (lanes & kWidth) {
#pragma omp simd
    for (int64_t p = 0; p < kWidth; ++p) f(first + p);
  }
  if constexpr (kWidth > 1) for_lanes_left<kWidth / 2>(first + (lanes & kWidth), lanes, f);
}

// f(p) for all lanes, or for the first of them.
struct AllLanes {
  template <typename F>
  void operator()(const F& f) const {
    for_lanes_left<kLanes>(0, kLanes, f);
  }
};

struct FirstLanes {
  int64_t lanes;  // fewer than all

  template <typename F>
  void operator()(const F& f) const {
    for_lanes_left<kLanes / 2>(0, lanes, f);
  }
};

// f(p) for so many lanes, mostly all.
template <typename F>
inline void for_lanes(int64_t lanes, const F& f) {
  if (lanes == kLanes)
    AllLanes{}(f);
  else
    FirstLanes{lanes}(f);
}

// Calls f(at, for_lanes) for every step of a group, where for_lanes(g) calls g(p) for its lanes. Those that have all of
// them come first, in a loop of their own, which keeps its constants in registers. Overlapping, the last step of a long
// row takes all lanes, too: to merge some and then read all would wait for the processor's stores.
template <bool kOverlapping, typename B, typename F>
inline void for_steps(B block, const F& f) {
  const int64_t whole = block.whole_steps(), last = block.C - kLanes;
  for (int64_t k = 0; k < whole; ++k) f(At{k * block.step(), k * kLanes, 0}, AllLanes{});
  for (int64_t k = whole; k < block.steps(); ++k) {
    if constexpr (kOverlapping && !B::kSideBySide)
      f(At{last, last, k * kLanes - last}, AllLanes{});
    else
      f(At{k * block.step(), k * kLanes, 0}, FirstLanes{block.lanes(k)});
  }
}

// One loop over the elements of a block that does several jobs, while it is in cache and so that one may wait for
// memory while another keeps the processor busy. job.of(block, group) does its part for a group: step(at, for_lanes) in
// every step, and finish() after them. What a job writes no other one reads.
template <bool kOverlapping, typename B, typename... Jobs>
FUSED_OPS_VECTORIZED void sweep(B block, Jobs... jobs) {
  const auto do_group = [&](auto&&... of_group) {
    for_steps<kOverlapping>(block, [&](At at, const auto& for_lanes) { (of_group.step(at, for_lanes), ...); });
    (of_group.finish(), ...);
  };
  for (int64_t group = 0; group < block.groups(); ++group) do_group(jobs.of(block, group)...);
}

template <typename Acc>
inline Acc larger(Acc a, Acc b) {
  return a < b ? b : a;  // passes over a NaN in b
}

template <typename Acc>
inline Acc smaller(Acc a, Acc b) {
  return b < a ? b : a;
}

// merged(a, b) of all lanes, by halves.
template <int64_t kWidth = kLanes, typename Acc, typename F>
inline Acc merge_lanes(Lanes<Acc>& lanes, const F& merged) {
  if constexpr (kWidth == 1) return lanes[0];
  constexpr int64_t kHalf = kWidth / 2;
#pragma omp simd
  for (int64_t p = 0; p < kHalf; ++p) lanes[p] = merged(lanes[p], lanes[p + kHalf]);
  return merge_lanes<kHalf>(lanes, merged);
}

// What is gathered in the lanes of a group. Aligned, so that compilers do not peel loops until it is; and to be copied
// would keep it from the processor's registers.
struct Gathered {
  Gathered() = default;
  Gathered(const Gathered&) = delete;
};

template <typename Acc>
struct Sums : Gathered {
  alignas(64) Lanes<Acc> sums;

  Sums() { std::fill(sums, sums + kLanes, Acc(0)); }
  Acc& operator[](int64_t p) { return sums[p]; }

  // To those of the rows.
  template <typename B>
  void add_up(Acc* of_rows) {
    if constexpr (B::kSideBySide)
      std::copy(sums, sums + kLanes, of_rows);
    else
      *of_rows = merge_lanes(sums, [](Acc a, Acc b) { return a + b; });
  }
};

// The largest of what each lane sees, passing over NaN.
template <typename T, bool k16Bits = sizeof(T) == 2>
struct Largest : Gathered {
  alignas(64) Lanes<T> largest;

  Largest() { std::fill(largest, largest + kLanes, -std::numeric_limits<T>::infinity()); }

  void see(int64_t p, T x) { largest[p] = larger(largest[p], x); }
  T of_lane(int64_t p) const { return largest[p]; }
  T of_all() { return merge_lanes(largest, larger<T>); }
};

// Of 16 bits, in integers, of which a vector has twice as many as of floats: of positive values (and NaN) the largest
// has the most bits, of negative ones the least.
template <typename T>
struct Largest<T, true> : Gathered {
  alignas(64) Lanes<int16_t> most;
  alignas(64) Lanes<uint16_t> least;

  Largest() {
    std::fill(most, most + kLanes, std::numeric_limits<int16_t>::min());
    std::fill(least, least + kLanes, narrow<T>(-std::numeric_limits<float>::infinity()).x);
  }

  void see(int64_t p, T x) {
    most[p] = larger(most[p], static_cast<int16_t>(x.x));
    least[p] = smaller(least[p], x.x);
  }
  T of_lane(int64_t p) const { return T(most[p] < 0 ? least[p] : static_cast<uint16_t>(most[p]), T::from_bits()); }
  T of_all() {
    most[0] = merge_lanes(most, larger<int16_t>);
    least[0] = merge_lanes(least, smaller<uint16_t>);
    return of_lane(0);
  }
};

}  // namespace fused_ops
