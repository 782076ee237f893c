// The emulated card: its fibers, and the order in which they run.
#undef _FORTIFY_SOURCE  // it holds the way from one stack to another for a mistake

#include "machine.h"

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <set>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// What the kernels declare as `extern __shared__ unsigned char shared[]`.
namespace fused_ops {
thread_local __attribute__((aligned(1024))) unsigned char shared[emulation::kMostSharedMemory];
}

namespace emulation {

Card card;
Launch launched;
Group group;
Thread* running = nullptr;
bool in_kernel = false;
SharedMemory shared_memory;
std::string message;

bool within(const void* address, const void* begin, size_t bytes) {
  return static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(begin)) < bytes;
}

// One file may have its name in several copies.
bool Place::operator==(const Place& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }

std::string name(Place place) {
  const char* file = std::strrchr(place.file, '/');
  return std::string(file ? file + 1 : place.file) + ":" + std::to_string(place.line);
}

namespace {

jmp_buf scheduler;
void (*entry)(const void*);
uint32_t blocks_so_far = 0, launches_so_far = 0;

// ------------------------------------------------------------------------------------------------------------- fibers

[[noreturn]] void back_to_scheduler() { _longjmp(scheduler, 1); }

// A fiber's whole life: one kernel's thread after the other.
void live() {
  for (;;) {
    if (_setjmp(running->context) == 0) back_to_scheduler();
    in_kernel = true;
    entry(launched.call);
    in_kernel = false;
    if (!running->copies.empty()) fail("a thread ends with copies under way that it did not wait for");
    running->ended = true;
  }
}

void resume(Thread* thread) {
  running = thread;
  threadIdx = {static_cast<unsigned>(thread->number), 0, 0};
  if (_setjmp(scheduler) == 0) _longjmp(thread->context, 1);
  running = nullptr;
}

// Fibers are made when they are needed, and kept for the next launch.
std::vector<std::unique_ptr<Thread>> fibers;

Thread* fiber(size_t i) {
  if (i < fibers.size()) return fibers[i].get();
  fibers.push_back(std::make_unique<Thread>());
  Thread* thread = fibers.back().get();
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) std::abort();
  thread->stack = static_cast<unsigned char*>(stack);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, live, 0);
  running = thread;  // it runs to its beginning, where longjmp can resume it, which takes less time
  if (_setjmp(scheduler) == 0) setcontext(&context);
  running = nullptr;
  return thread;
}

// After a failure fibers are somewhere in a kernel: new ones take their place.
void drop_fibers() {
  for (const auto& thread : fibers) munmap(thread->stack, kStack);
  fibers.clear();
}

// ---------------------------------------------------------------------------------------------------------- scheduling

// Lets threads go on if all of them wait at this barrier. Returns whether they do.
bool release(Thread* const* threads, size_t count, Barrier barrier) {
  const auto waits = [=](const Thread* t) { return !t->ended && t->waits_for == barrier; };
  const auto waiting = static_cast<size_t>(std::count_if(threads, threads + count, waits));
  if (waiting == 0) return false;
  const Place place = (*std::find_if(threads, threads + count, waits))->place;
  for (size_t i = 0; i < count; ++i) {
    if (threads[i]->ended) {
      message = "a thread ended where others wait for it: " + name(place);
      return false;
    }
    if (waits(threads[i]) && !(threads[i]->place == place)) {
      message = "threads wait at different barriers: " + name(place) + ", " + name(threads[i]->place);
      return false;
    }
  }
  if (waiting < count) return false;
  for (size_t i = 0; i < count; ++i) threads[i]->waits_for = Barrier::kNone;
  return true;
}

// Runs the block's threads as long as any can go on. Returns whether any could.
bool run(Block& block) {
  if (group.blocks.size() > 1) std::memcpy(shared_memory.begin, block.shared.data(), shared_memory.bytes);
  blockIdx = block.index;
  const size_t count = block.threads.size();
  bool any = false;
  for (bool released = true; released && message.empty();) {
    for (Thread* thread : block.order) {
      if (thread->ended || thread->waits_for != Barrier::kNone) continue;
      resume(thread);
      any = true;
      if (!message.empty()) return any;
    }
    released = false;
    for (size_t first = 0; first < count; first += kWarp)
      released |= release(&block.threads[first], std::min<size_t>(kWarp, count - first), Barrier::kWarp);
    if (release(block.threads.data(), count, Barrier::kBlock)) {
      ++block.time;
      released = true;
    }
  }
  if (group.blocks.size() > 1) std::memcpy(block.shared.data(), shared_memory.begin, shared_memory.bytes);
  return any;
}

std::string where_they_wait(const std::vector<Thread*>& threads) {
  std::set<std::string> places;
  for (const Thread* thread : threads) places.insert(thread->ended ? "the end" : name(thread->place));
  std::string all = "threads wait for each other in vain:";
  for (const std::string& place : places) all += " " + place;
  return all;
}

// The orders in which what could run at the same time runs, one after the other: forwards, backwards, and shuffled.
template <typename T>
void put_in_order(std::vector<T>& things) {
  if (launches_so_far % 3 == 1) std::reverse(things.begin(), things.end());
  if (launches_so_far % 3 == 2) std::shuffle(things.begin(), things.end(), std::mt19937(launches_so_far));
}

// Runs the blocks from `first` on, which are on the card together.
void run_group(const Grid& grid, unsigned first, unsigned count) {
  group = {launched.first_block + first, 0, std::vector<Block>(count)};
  std::vector<Thread*> all;
  std::vector<Block*> order;
  for (Block& block : group.blocks) {
    const auto b = static_cast<unsigned>(order.size());
    block.index = {first + b, 0, 0};
    block.serial = group.serial + b;
    if (count > 1) block.shared.resize(shared_memory.bytes);
    for (unsigned t = 0; t < grid.threads.x; ++t) {
      Thread* thread = fiber(all.size());
      thread->number = static_cast<int>(t);
      thread->block = &block;
      thread->waits_for = Barrier::kNone;
      thread->ended = false;
      thread->exchanges = 0;
      block.threads.push_back(thread);
      all.push_back(thread);
    }
    block.order = block.threads;
    put_in_order(block.order);
    order.push_back(&block);
  }
  put_in_order(order);

  for (;;) {
    bool any = false;
    for (Block* block : order) any |= run(*block);
    if (!message.empty() || std::all_of(all.begin(), all.end(), [](const Thread* t) { return t->ended; })) return;
    if (release(all.data(), all.size(), Barrier::kGroup)) {
      ++group.time;
      for (Block& block : group.blocks) ++block.time;
    } else if (!any) {
      message = where_they_wait(all);
    }
  }
}

// Finds the thread_local variables of the library that this is in.
int find_shared_memory(dl_phdr_info* info, size_t, void*) {
  const unsigned char* dynamic = fused_ops::shared;
  auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
  for (int i = 0; begin && i < info->dlpi_phnum; ++i) {
    const auto bytes = static_cast<int64_t>(info->dlpi_phdr[i].p_memsz);
    if (info->dlpi_phdr[i].p_type != PT_TLS || dynamic < begin || dynamic >= begin + bytes) continue;
    shared_memory = {begin, bytes, dynamic - begin};
    return 1;
  }
  return 0;
}

}  // namespace

bool launch(const Grid& grid, void (*call)(const void*), const void* arguments, size_t bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  dl_iterate_phdr(find_shared_memory, nullptr);
  message.clear();
  ++launches_so_far;
  blockDim = grid.threads;
  gridDim = grid.blocks;
  entry = call;
  launched = {grid.cooperative, grid.cluster, grid.dynamic_memory, arguments, bytes, blocks_so_far + 1};
  blocks_so_far += grid.blocks.x;
  const unsigned together = grid.cooperative ? grid.blocks.x : grid.cluster;
  std::vector<unsigned> firsts;
  for (unsigned first = 0; first < grid.blocks.x; first += together) firsts.push_back(first);
  put_in_order(firsts);
  for (unsigned first : firsts)
    if (message.empty()) run_group(grid, first, together);
  if (!message.empty()) drop_fibers();
  return message.empty();
}

// ------------------------------------------------------------------------------------------------------ by a thread

void fail(const std::string& why) {
  message = why;
  back_to_scheduler();
}

void wait(Barrier barrier, Place place) {
  const OutOfKernel out;
  running->waits_for = barrier;
  running->place = place;
  if (_setjmp(running->context) == 0) back_to_scheduler();
}

void wait_for_grid(Place place) {
  const OutOfKernel out;
  if (!launched.cooperative) fail("blocks wait for each other that need not be there together: " + name(place));
  wait(Barrier::kGroup, place);
}

void exchange(unsigned mask, void* value, size_t bytes, int lane_mask, Place place) {
  const OutOfKernel out;
  Thread& thread = *running;
  if (mask != 0xffffffff || bytes > sizeof(thread.shown[0]) || thread.block->threads.size() % kWarp)
    fail("an exchange that is not emulated: " + name(place));
  const int which = thread.exchanges++ % 2;  // the one before may still be read by others
  std::memcpy(&thread.shown[which], value, bytes);
  wait(Barrier::kWarp, place);
  std::memcpy(value, &thread.block->threads[thread.number ^ lane_mask]->shown[which], bytes);
}

void copy_async(void* to, const void* from, size_t bytes) {
  const OutOfKernel out;
  const auto is_shared = [](const void* at) { return within(at, shared_memory.begin, shared_memory.bytes); };
  const auto is_aligned = [=](const void* at) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; };
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("an asynchronous copy takes 4, 8 or 16 bytes");
  if (!is_aligned(to) || !is_aligned(from))
    fail("an asynchronous copy between addresses that are no multiple of its size");
  if (!is_shared(to) || is_shared(from)) fail("an asynchronous copy goes to shared memory, not from there");
  running->copies.push_back({to, from, bytes});
}

void wait_for_copies() {
  const OutOfKernel out;
  for (const Copy& copy : running->copies) {
    check_access(copy.from, copy.bytes, false);
    check_access(copy.to, copy.bytes, true);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  running->copies.clear();
}

void* of_neighbour(int rank, void* here) {
  const OutOfKernel out;
  if (rank < 0 || rank >= launched.cluster) fail("there is no such block in the cluster");
  Block& block = group.blocks[rank];
  if (&block == running->block) return here;
  return block.shared.data() + (static_cast<unsigned char*>(here) - shared_memory.begin);
}

}  // namespace emulation

// What a kernel's assert calls where it does not hold.
extern "C" __attribute__((visibility("hidden"), noreturn)) void __assert_fail(const char* what, const char* file,
                                                                              unsigned line, const char*) noexcept {
  const emulation::OutOfKernel out;
  const std::string message = std::string("device-side assert: ") + what;
  if (!emulation::running) std::abort();
  emulation::fail(message + ", " + file + ":" + std::to_string(line));
}
