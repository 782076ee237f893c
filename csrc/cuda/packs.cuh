// Packs: what a thread reads and writes at once, and their way to shared memory.
#pragma once

#include <cuda_pipeline.h>

#include <cstdint>

#include "../numeric.h"

namespace fused_ops {

// Neighbours in memory, of kLanes channels. The k-th is of the (k % kLanes)-th.
template <typename T, int kSize_, int kLanes_ = 1>
struct alignas(sizeof(T) * kSize_) Pack {
  static constexpr int kSize = kSize_, kLanes = kLanes_;
  T values[kSize];
};

template <typename P, typename T>
__device__ P load(const T* from, int64_t offset) {
  return *reinterpret_cast<const P*>(from + offset);
}

// A pack in the accumulate type. Two bfloat16 of a word take a step each, where one by one they take three together.
template <typename T, int kSize, int kLanes>
__device__ Pack<accumulate_t<T>, kSize> widen(const Pack<T, kSize, kLanes>& pack) {
  Pack<accumulate_t<T>, kSize> wide;
  if constexpr (std::is_same_v<T, c10::BFloat16> && kSize > 1) {
    const auto words = fused_ops::bit_cast<Pack<uint32_t, kSize / 2>>(pack);
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      wide.values[k] =
          fused_ops::bit_cast<float>(k % 2 ? words.values[k / 2] & 0xFFFF0000u : words.values[k / 2] << 16);
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) wide.values[k] = widen(pack.values[k]);
  }
  return wide;
}

// To global memory. Without __stcg, which says to L2, where it goes anyway, compilers write 16 bytes in several pieces.
template <typename P, typename T>
__device__ void store(T* to, int64_t offset, const P& pack) {
  if constexpr (sizeof(P) == sizeof(uint4))
    __stcg(reinterpret_cast<uint4*>(to + offset), fused_ops::bit_cast<uint4>(pack));
  else
    *reinterpret_cast<P*>(to + offset) = pack;
}

// The largest values that a thread has seen at each place of its packs; a NaN is passed over. Those of 16 bits are
// compared two at a time, as they lie in a word.
template <typename T, int size>
class Largest {
  static constexpr bool kPairs = sizeof(T) == 2;
  using Word = std::conditional_t<kPairs, uint32_t, T>;
  using Pair = Pack<T, 2>;
  using Words = Pack<Word, size / (kPairs ? 2 : 1)>;
  Words largest;

  __device__ static Word larger(Word a, Word b) {
    if constexpr (!kPairs) {
      return fmax(a, b);
    } else {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
      if constexpr (std::is_same_v<T, c10::BFloat16>)
        asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
      else
        asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
      return a;
#else  // on older cards, and in the emulation
      auto of_a = fused_ops::bit_cast<Pair>(a), of_b = fused_ops::bit_cast<Pair>(b);
      for (int k = 0; k < 2; ++k) of_a.values[k] = fmax(widen(of_a.values[k]), widen(of_b.values[k]));
      return fused_ops::bit_cast<Word>(of_a);
#endif
    }
  }

 public:
  __device__ explicit Largest(T least) {
    for (Word& word : largest.values)
      if constexpr (kPairs)
        word = fused_ops::bit_cast<Word>(Pair{{least, least}});
      else
        word = least;
  }

  __device__ void see(const T* from, int64_t offset) {
    const auto seen = *reinterpret_cast<const Words*>(from + offset);
#pragma unroll
    for (int k = 0; k < Words::kSize; ++k) largest.values[k] = larger(largest.values[k], seen.values[k]);
  }

  __device__ accumulate_t<T> operator()() const {
    const auto values = fused_ops::bit_cast<Pack<T, size>>(largest);
    accumulate_t<T> most = widen(values.values[0]);
    for (const T x : values.values) most = fmax(most, widen(x));
    return most;
  }
};

// Sets out to copy a pack to shared memory, by way of no registers, so that all are under way at once.
template <typename P, typename T>
__device__ void copy_async(P* to, const T* from) {
  if constexpr (sizeof(P) >= 4)
    __pipeline_memcpy_async(to, reinterpret_cast<const P*>(from), sizeof(P));
  else
    *to = *reinterpret_cast<const P*>(from);
}

// Until those that the calling thread set out to copy are there, for itself; for others behind the next barrier.
__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

}  // namespace fused_ops
