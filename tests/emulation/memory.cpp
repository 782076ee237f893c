// Every access that a kernel makes to memory: compilers that instrument code for a thread sanitizer call the functions
// at the foot of this file, which are ours.
//
// An access is in bounds, and of memory that its kernel may write, if it writes; its address suits its type; of shared
// memory it reads what this block has written. Of two accesses to one place by different threads, one of which writes,
// the first is before a barrier for both, the second behind it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <array>
#include <memory>
#include <unordered_map>

#include "machine.h"

namespace emulation {
namespace {

// By whom, and in which of the times between barriers.
struct Access {
  uint32_t block = 0, of_group = 0, block_time = 0, group_time = 0;  // block: 0 if there was none
  int thread = 0;

  static Access now() {
    return {running->block->serial, group.serial, running->block->time, group.time, running->number};
  }
  bool same_thread(const Access& other) const { return block == other.block && thread == other.thread; }
  // Whether a barrier, or the end of its kernel, lies between this one and `later`.
  bool is_before(const Access& later) const {
    if (block < launched.first_block || same_thread(later)) return true;
    if (block == later.block) return block_time != later.block_time;
    return of_group == later.of_group && group_time != later.group_time;
  }
};

// Two bytes of memory: what was done to them last. Of readers there are two, for one of them may be who writes next.
struct Cell {
  uint32_t owner = 0;  // the block or launch in which this was
  Access write, read, other_read;
};
constexpr uintptr_t kCell = 2, kPage = 4096;
using Page = std::array<Cell, kPage / kCell>;
using Pages = std::unordered_map<uintptr_t, std::unique_ptr<Page>>;

Pages global_pages;
std::vector<Pages> shared_pages;  // of each block of the group

Cell& cell_at(Pages& pages, uintptr_t address, uint32_t owner) {
  auto& page = pages[address / kPage];
  if (!page) page = std::make_unique<Page>();
  Cell& cell = (*page)[address % kPage / kCell];
  if (cell.owner != owner) cell = {owner};
  return cell;
}

std::string who(const Access& access) {
  return "thread " + std::to_string(access.thread) + " of block " + std::to_string(access.block - launched.first_block);
}

void record(Cell& cell, bool writes, bool is_shared) {
  const Access now = Access::now();
  const auto check = [&](const Access& before, const char* did) {
    if (!before.is_before(now))
      fail("race in " + std::string(is_shared ? "shared" : "global") + " memory: " + who(now) +
           (writes ? " writes" : " reads") + " what " + who(before) + did + ", without a barrier between them");
  };
  check(cell.write, " wrote");
  if (writes) {
    check(cell.read, " read");
    check(cell.other_read, " read");
    cell.write = now;
  } else {
    if (is_shared && cell.write.block == 0)
      fail(who(now) + " reads shared memory that nobody has written since the block began");
    if (!cell.read.same_thread(now)) cell.other_read = cell.read;
    cell.read = now;
  }
}

// Records what is done to so many bytes from an address on.
void record(Pages& pages, uintptr_t first, size_t bytes, uint32_t owner, bool writes, bool is_shared) {
  for (uintptr_t cell = first / kCell; cell <= (first + bytes - 1) / kCell; ++cell)
    record(cell_at(pages, cell * kCell, owner), writes, is_shared);
}

void check_shared(const Block& owner, int64_t offset, size_t bytes, bool writes) {
  const int64_t in_dynamic = offset - shared_memory.dynamic_begin;
  if (in_dynamic >= 0 && in_dynamic < kMostSharedMemory &&
      in_dynamic + static_cast<int64_t>(bytes) > launched.dynamic_memory)
    fail("access beyond the block's dynamic shared memory, at byte " + std::to_string(in_dynamic) + " of " +
         std::to_string(launched.dynamic_memory));
  const size_t number = owner.serial - group.serial;
  if (number >= shared_pages.size()) shared_pages.resize(number + 1);
  record(shared_pages[number], offset, bytes, owner.serial, writes, true);
}

// Of a tensor that the op at work has asked for the address of. They may overlap.
struct Extent {
  uintptr_t begin, end;
  bool writable;
};
std::vector<Extent> tensors;

// The library itself, in which constants are.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];

void check_global(const void* address, size_t bytes, bool writes) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  bool in_bounds = false, writable = false;
  for (const Extent& extent : tensors) {
    if (first < extent.begin || first + bytes > extent.end) continue;
    in_bounds = true;
    writable |= extent.writable;
  }
  if (!in_bounds) fail("access to memory that is of no tensor");
  if (writes && !writable) fail("a tensor is written that the op has asked for only to read");
  record(global_pages, first, bytes, launched.first_block, writes, false);
}

void note_tensor(AtenTensorHandle tensor, const void* data, bool writable) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr, last = 0;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return;
    last += (sizes[d] - 1) * strides[d];
  }
  const auto begin = reinterpret_cast<uintptr_t>(data);
  tensors.push_back({begin, begin + (last + 1) * aoti_torch_dtype_element_size(dtype), writable});
}

}  // namespace

void forget_tensors() { tensors.clear(); }

void check_access(const void* address, size_t bytes, bool writes) {
  if (within(address, running->stack, kStack)) return;
  if (within(address, shared_memory.begin, shared_memory.bytes))
    return check_shared(*running->block, static_cast<const unsigned char*>(address) - shared_memory.begin, bytes,
                        writes);
  for (const Block& block : group.blocks) {
    if (!within(address, block.shared.data(), block.shared.size())) continue;
    for (const Thread* thread : block.threads)
      if (thread->ended) fail("access to the shared memory of a block that ends");
    return check_shared(block, static_cast<const unsigned char*>(address) - block.shared.data(), bytes, writes);
  }
  const bool is_constant =
      within(address, __ehdr_start, _end - __ehdr_start) || within(address, launched.call, launched.call_bytes);
  if (is_constant && !writes) return;
  check_global(address, bytes, writes);
}

}  // namespace emulation

// ------------------------------------------------------------------------------------------- by compilers and linkers

// The linker has calls of these PyTorch functions come here instead (--wrap).
extern "C" {
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  if (!error) emulation::note_tensor(tensor, *data, false);
  return error;
}

AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  if (!error) emulation::note_tensor(tensor, *data, true);
  return error;
}

static void check(const void* address, size_t bytes, bool writes) {
  if (!emulation::in_kernel) return;
  const emulation::OutOfKernel out;
  emulation::check_access(address, bytes, writes);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
// Of the host alone, in its shared_ptr: the kernels have no atomics.
int __tsan_atomic32_fetch_add(volatile int* at, int value, int order) {
  if (emulation::in_kernel) {
    const emulation::OutOfKernel out;
    emulation::fail("atomics are not emulated");
  }
  return __atomic_fetch_add(at, value, order);
}
void __tsan_read_range(void* address, size_t bytes) { check(address, bytes, false); }
void __tsan_write_range(void* address, size_t bytes) { check(address, bytes, true); }

#define EMULATION_ACCESSES(bytes)                                                    \
  void __tsan_read##bytes(void* address) { check(address, bytes, false); }           \
  void __tsan_write##bytes(void* address) { check(address, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* address) { check(address, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* address) { check(address, bytes, true); }
EMULATION_ACCESSES(1)
EMULATION_ACCESSES(2)
EMULATION_ACCESSES(4)
EMULATION_ACCESSES(8)
EMULATION_ACCESSES(16)

// And those that are called where behaviour is undefined, with the place first.
#define EMULATION_UNDEFINED(which, what)                               \
  void __ubsan_handle_##which(const emulation::Place* place) {         \
    if (!emulation::in_kernel) return;                                 \
    const emulation::OutOfKernel out;                                  \
    emulation::fail(std::string(what ": ") + emulation::name(*place)); \
  }
EMULATION_UNDEFINED(type_mismatch_v1, "an address that is no multiple of its type's alignment")
EMULATION_UNDEFINED(out_of_bounds, "an index beyond its array")
EMULATION_UNDEFINED(add_overflow, "a sum beyond its type")
EMULATION_UNDEFINED(sub_overflow, "a difference beyond its type")
EMULATION_UNDEFINED(mul_overflow, "a product beyond its type")
EMULATION_UNDEFINED(divrem_overflow, "a division by zero")
EMULATION_UNDEFINED(negate_overflow, "a negative beyond its type")
}
