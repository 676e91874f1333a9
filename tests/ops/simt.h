// Plays the GPU: compiles a CUDA source with a plain C++ compiler and runs its kernels on the CPU.
//
// Include before the source (g++ -x c++ -include simt.h kernel.cu). Each CUDA thread is a fiber with
// a stack of its own; the threads of a block take turns, and one that waits at a barrier or a shuffle
// gives way. The order of turns is a setting: a kernel whose result depends on it lacks a barrier.
// Shared memory is allocated for each launch to the byte and filled with NaN, so that the address
// sanitiser finds an overrun and the result shows what was never written. Threads that meet at
// different barriers, and launches beyond what every GPU allows, end the program with a sentence.

#pragma once

#define PRISMER_SIMT

#include <ucontext.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define PRISMER_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::simt::launch(grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); })
#define PRISMER_DYNAMIC_SHARED(name) unsigned char* name = ::simt::shared

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

enum class Order { kForward, kReverse, kRandom };
inline Order order = Order::kForward;
inline unsigned skipped_barrier = 0;  // line of a __syncthreads that is left out: a planted bug
inline std::mt19937 draw;
inline int64_t launches = 0;
inline unsigned char* shared = nullptr;

using Place = std::source_location;
constexpr size_t kStack = 64 << 10;
constexpr unsigned kWarp = 32;

struct Thread {
  enum { kReady, kAtBlock, kAtWarp, kDone } state;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  void* sanitizer = nullptr;
  dim3 index;
  unsigned number, mask, shuffles;
  Place place;
};

inline std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch
inline unsigned count = 0;                            // of the block that runs
inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline uint64_t slots[2][1024];  // what the lanes exchange

[[noreturn]] inline void fail(const char* what, Place place = Place::current()) {
  std::fprintf(
      stderr, "simt: %s (%s:%u, block %u,%u,%u)\n", what, place.file_name(),
      static_cast<unsigned>(place.line()), blockIdx.x, blockIdx.y, blockIdx.z);
  std::exit(3);
}

// the address sanitiser must know on which stack the program is
#if defined(__SANITIZE_ADDRESS__)
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_size = 0;
inline void leave(void** keep, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(keep, stack, size);
}
inline void arrive(void* kept, const void** stack, size_t* size) {
  __sanitizer_finish_switch_fiber(kept, stack, size);
}
inline void clean(const void* stack) { __asan_unpoison_memory_region(stack, kStack); }
#else
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_size = 0;
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
inline void clean(const void*) {}
#endif

// from the scheduler to a thread, until that gives way
inline void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  void* kept = nullptr;
  leave(&kept, thread.stack.get(), kStack);
  swapcontext(&scheduler, &thread.context);
  arrive(kept, nullptr, nullptr);
}

inline void give_way() {
  Thread& me = *current;
  leave(me.state == Thread::kDone ? nullptr : &me.sanitizer, scheduler_stack, scheduler_size);
  swapcontext(&me.context, &scheduler);
  arrive(me.sanitizer, &scheduler_stack, &scheduler_size);
}

inline void thread_main() {
  arrive(nullptr, &scheduler_stack, &scheduler_size);
  body();
  current->state = Thread::kDone;
  give_way();
}

inline bool together(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column();
}

inline void meet_warp(unsigned mask, Place place) {
  Thread& me = *current;
  const unsigned first = me.number / kWarp * kWarp;
  if (!(mask >> (me.number - first) & 1)) fail("a lane is not in its own mask", place);
  me.state = Thread::kAtWarp, me.mask = mask, me.place = place;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= count || threads[first + lane]->state == Thread::kDone) {
      fail("a lane of the mask is not there", place);
    }
    const Thread& other = *threads[first + lane];
    if (other.state != Thread::kAtWarp) return give_way();
    if (other.mask != mask || !together(other.place, place)) {
      fail("lanes of a warp meet at different places", place);
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) threads[first + lane]->state = Thread::kReady;
  }
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& me = *current;
  const unsigned first = me.number / kWarp * kWarp;
  if (source >= kWarp || !(mask >> source & 1)) fail("a shuffle from a lane outside", place);
  // two sets in turn: a fast lane may be at the next shuffle, not at the one after it
  uint64_t* values = slots[me.shuffles++ % 2] + first;
  std::memcpy(&values[me.number - first], &value, sizeof(T));
  meet_warp(mask, place);
  std::memcpy(&value, &values[source], sizeof(T));
  return value;
}

// the next of `total` things to run, of those that `ready` says may; `total` if there are none
template <typename Ready>
unsigned next(unsigned total, const Ready& ready) {
  // greedy, not fair: the first runs as far ahead of the others as the barriers let it
  const unsigned start = order == Order::kRandom ? draw() % total : 0;
  for (unsigned step = 0; step < total; ++step) {
    const unsigned i = (start + step) % total;
    const unsigned turn = order == Order::kReverse ? total - 1 - i : i;
    if (ready(turn)) return turn;
  }
  return total;
}

inline void run_block() {
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = *threads[i];
    thread.state = Thread::kReady, thread.number = i, thread.shuffles = 0;
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    clean(thread.stack.get());
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
  }
  while (true) {
    const auto ready = [](unsigned i) { return threads[i]->state == Thread::kReady; };
    for (unsigned i; (i = next(count, ready)) < count;) resume(*threads[i]);
    // nobody can go on: all are done, or all the others have met at one barrier
    const Thread* met = nullptr;
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = *threads[i];
      if (thread.state == Thread::kDone) continue;
      if (thread.state == Thread::kAtWarp) fail("a warp waits for a lane", thread.place);
      if (met && !together(met->place, thread.place)) fail("different barriers", thread.place);
      met = &thread;
      thread.state = Thread::kReady;
    }
    if (!met) return;
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  ++launches;
  gridDim = grid, blockDim = block, body = std::move(kernel), count = block.x * block.y * block.z;
  if (count == 0 || count > 1024) fail("a block has 1 to 1024 threads");
  if (shared_bytes > 48 << 10) fail("more than 48 KB of shared memory");
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) fail("grid size");
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  const std::unique_ptr<unsigned char[]> memory(new unsigned char[shared_bytes]);
  shared = memory.get();
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t place = order == Order::kReverse ? blocks - 1 - i : i;
    blockIdx = dim3(place % grid.x, place / grid.x % grid.y, place / (uint64_t{grid.x} * grid.y));
    std::memset(shared, 0xff, shared_bytes);
    run_block();
  }
}

}  // namespace simt

inline void __syncthreads(simt::Place place = simt::Place::current()) {
  if (place.line() == simt::skipped_barrier) return;
  simt::current->state = simt::Thread::kAtBlock;
  simt::current->place = place;
  simt::give_way();
}

inline void __syncwarp(unsigned mask = ~0u, simt::Place place = simt::Place::current()) {
  simt::meet_warp(mask, place);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, simt::Place place = simt::Place::current()) {
  return simt::exchange(mask, value, source % simt::kWarp, place);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step, simt::Place place = simt::Place::current()) {
  return simt::exchange(mask, value, simt::current->number % simt::kWarp ^ step, place);
}

inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(uint32_t{value.bits} << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  _Float16 value;
};

inline float __half2float(__half value) { return static_cast<float>(value.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

namespace prismer {
inline int last_error() { return 0; }
}  // namespace prismer
