// The card that is emulated: what the headers beside this one, which kernels include, and memory.cpp know of it.
//
// Each thread of a block is a fiber. One runs at a time, on the thread of the host that launched the kernel, until it
// waits: for its warp, for its block, or for its group, the blocks that are on the card together (all of a cooperative
// launch, those of a cluster, else a single one). Shared memory is that of thread_local variables. As there is one
// thread of the host, there is one copy of them, which is that of the block whose threads run; those of the group's
// other blocks are put aside.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <string>
#include <vector>

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr int64_t kMostSharedMemory = 227 * 1024, kStack = 64 * 1024;

// A small card of a large one's kind: so small that tests which are small, too, meet its bounds.
struct Card {
  int processors = 4, threads = 2048;  // the latter of a processor, at most
  int64_t shared_memory = 99 * 1024;   // of a block, at most; a processor has 1 KiB more
  bool clusters = true;
};
extern Card card;

// A place in a kernel's source.
struct Place {
  const char* file;
  int line;

  bool operator==(const Place& other) const;
};
#define EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Barrier { kNone, kWarp, kBlock, kGroup };

// An asynchronous copy that a thread has set out.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  int number = 0;
  struct Block* block = nullptr;
  Barrier waits_for = Barrier::kNone;
  Place place{};
  bool ended = true;
  uint64_t shown[2] = {};  // to its warp, in this exchange and in the one before
  int exchanges = 0;
  std::vector<Copy> copies;
  unsigned char* stack = nullptr;
  jmp_buf context;
};

struct Block {
  uint3 index;
  uint32_t serial;    // no other block of this process has it
  uint32_t time = 0;  // how many barriers its threads have passed
  std::vector<Thread*> threads, order;
  std::vector<unsigned char> shared;  // what was put aside
};

// Of the launch, whose blocks have the serial numbers from first_block on; and of the group.
struct Launch {
  bool cooperative = false;
  int cluster = 1;
  int64_t dynamic_memory = 0;
  const void* call = nullptr;  // the kernel and its arguments, of so many bytes
  size_t call_bytes = 0;
  uint32_t first_block = 0;
};
struct Group {
  uint32_t serial = 0;  // of its first block
  uint32_t time = 0;    // how many barriers of all its threads these have passed
  std::vector<Block> blocks;
};
extern Launch launched;
extern Group group;
extern Thread* running;  // null: the host

// Whether a kernel's own code runs, whose accesses are to be checked. The code of this emulation shares templates of
// the standard library with that of kernels: where the linker has taken the copy of kernels, that calls for checks,
// too.
extern bool in_kernel;
class OutOfKernel {
 public:
  OutOfKernel() : before_(in_kernel) { in_kernel = false; }
  ~OutOfKernel() { in_kernel = before_; }

 private:
  bool before_;
};

// This thread's copy of the library's thread_local variables, so of all shared memory; dynamic memory is one of them.
struct SharedMemory {
  unsigned char* begin;
  int64_t bytes, dynamic_begin;
};
extern SharedMemory shared_memory;
bool within(const void* address, const void* begin, size_t bytes);

// What a thread that runs does. These are functions, not in headers, since those are compiled as kernels are: each
// access of theirs is checked. `wait` is until all whom it concerns do, at the same place.
void wait(Barrier barrier, Place place);
void wait_for_grid(Place place);
// Puts in *value that of the thread whose number in the warp differs in these bits.
void exchange(unsigned mask, void* value, size_t bytes, int lane_mask, Place place);
void copy_async(void* to, const void* from, size_t bytes);
void wait_for_copies();
// The same place as `here` in the shared memory of another block of the cluster.
void* of_neighbour(int rank, void* here);
// The kernel fails, with this message: the thread that runs, and all others, stop. Called out of the kernel.
[[noreturn]] void fail(const std::string& message);
std::string name(Place place);

// Runs call(arguments) by each thread of the blocks.
struct Grid {
  dim3 blocks, threads;
  int64_t dynamic_memory = 0;
  bool cooperative = false;
  int cluster = 1;
};
bool launch(const Grid& grid, void (*call)(const void*), const void* arguments, size_t bytes);
extern std::string message;  // why the last launch that failed did

// From memory.cpp: what has to be so of an access to memory, by the thread that runs.
void check_access(const void* address, size_t bytes, bool writes);
// From here on kernels may touch only the memory of tensors whose address is asked for.
void forget_tensors();

}  // namespace emulation
