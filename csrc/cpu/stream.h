// Outputs that no cache keeps until they are read again go past the caches: a line that is written there has to be
// read from memory first, which for an op that does little more than read and write is a third of its work.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fused_ops {

// Bytes of an output, from which on it is written past the caches; and of one that is worked out of an input read once,
// both of which can be in a large cache otherwise.
constexpr int64_t kStreamed = int64_t{1} << 22, kStreamedAlone = int64_t{1} << 24;

// n elements from a buffer in cache to memory, whole lines of it past the caches.
template <typename T>
inline void stream(const T* from, int64_t n, T* to) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64, kVector = sizeof(__m128i), kOfLine = kLine / sizeof(T);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(to) % kLine / sizeof(T);
  const int64_t begin = std::min(n, (kOfLine - misaligned) % kOfLine), end = begin + (n - begin) / kOfLine * kOfLine;
  std::copy(from, from + begin, to);
  for (int64_t i = begin; i < end; i += kOfLine) {
    const __m128i* line = reinterpret_cast<const __m128i*>(from + i);
    __m128i* to_line = reinterpret_cast<__m128i*>(to + i);
    for (int64_t v = 0; v < kLine / kVector; ++v) _mm_stream_si128(to_line + v, _mm_loadu_si128(line + v));
  }
  std::copy(from + end, from + n, to + end);
#else
  std::copy(from, from + n, to);
#endif
}

// Before others read what has been streamed.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace fused_ops
