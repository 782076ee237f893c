// Large outputs on huge pages. Of memory fresh from the system, what a kernel waits for is not the memory but its page
// faults, one for every 4 KiB that it touches first; huge pages have 2 MiB each. Batch norm of 17 MB takes two and a
// half times as long without them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_ops {

// The tensor itself, before anything is written to it. Where the system refuses, it stays as it is; and where it holds
// no whole huge page. Memory that glibc has kept to hand it out again, as it may up to 32 MiB, has been touched before:
// then this costs a call to the system and no more.
inline torch::stable::Tensor on_huge_pages(torch::stable::Tensor t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

}  // namespace fused_ops
