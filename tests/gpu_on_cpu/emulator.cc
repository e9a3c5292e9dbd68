// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#ifndef __x86_64__
#error "fibers are switched in x86-64 assembly"
#endif

// Saves the registers that calls keep, and goes on with those of another stack.
extern "C" void JaxAttnSwitchFiber(void** from, void* to);
asm(R"(
.text
.hidden JaxAttnSwitchFiber
.globl JaxAttnSwitchFiber
.type JaxAttnSwitchFiber, @function
JaxAttnSwitchFiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size JaxAttnSwitchFiber, .-JaxAttnSwitchFiber
)");

// Clang calls it, and the GCC that comes with it may be too old to have it: rounds to nearest even.
extern "C" __attribute__((weak, visibility("hidden"))) __bf16 __truncsfbf2(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_bit_cast(__bf16, static_cast<uint16_t>(rounded));
}

// Static shared memory of all kernels (see hip/hip_runtime.h), if there is any.
extern "C" char __start_gpu_on_cpu_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_gpu_on_cpu_shared[] __attribute__((weak, visibility("hidden")));

namespace gpu_on_cpu {

Lane* current = nullptr;
dim3 block_index, block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMaxSharedBytes = 61 * 1024;  // 64 KiB but for static arrays
constexpr size_t kGuardBytes = 64;             // behind shared memory, which nobody may write
constexpr char kGuard = 0x5a;

struct Wave {
  Lane* lanes = nullptr;
  unsigned arrived = 0;  // lanes at the operation that is being gathered
  unsigned parked = 0;
  unsigned done = 0;
  uint64_t completed = 0;  // operations
  Operation operation = Operation::kFence;
  Slot slots[2][kWave];  // a lane can be one operation ahead of others
};

struct Block {
  std::vector<Lane> lanes;
  std::vector<Wave> waves;
  std::unique_ptr<char[]> shared;
  size_t shared_bytes = 0;
  const void* kernel = nullptr;
  Invoke invoke = nullptr;
  void** args = nullptr;
};

std::mutex mutex;  // of what follows: one launch at a time
std::map<const void*, Invoke>& Kernels() {
  static std::map<const void*, Invoke> kernels;
  return kernels;
}
Block block;
void* scheduler = nullptr;  // its stack pointer
std::string failure;

Wave& WaveOf(const Lane& lane) { return block.waves[lane.index / kWave]; }

void SwitchTo(Lane* next) {
  Lane* const self = current;
  current = next;
  JaxAttnSwitchFiber(&self->stack_pointer, next->stack_pointer);
}

void BackToScheduler() { JaxAttnSwitchFiber(&current->stack_pointer, scheduler); }

// Lets the next lane of the wave run that is not parked.
void Yield(const Wave& wave) {
  if (wave.parked > 0 && wave.arrived + wave.parked == kWave && wave.arrived > 0) {
    Fail("some lanes of a wave are at an operation of the wave, others at a barrier or done");
  }
  if (wave.parked == kWave) return BackToScheduler();
  unsigned next = LaneIndex();
  do {
    next = (next + 1) % kWave;
  } while (wave.lanes[next].parked);
  if (&wave.lanes[next] != current) SwitchTo(&wave.lanes[next]);
}

void Park() {
  Wave& wave = WaveOf(*current);
  current->parked = true;
  ++wave.parked;
  Yield(wave);
}

void Enter() {
  block.invoke(block.kernel, block.args);
  current->done = true;
  ++WaveOf(*current).done;
  Park();
  __builtin_trap();  // nobody goes on with a lane that is done
}

void Prepare(Lane& lane) {
  void** top = reinterpret_cast<void**>(lane.stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(Enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  lane.stack_pointer = top;
  lane.parked = lane.done = false;
}

void RunUntilParked(Wave& wave) {
  Lane* lane = wave.lanes;
  while (lane->done) ++lane;
  for (unsigned i = 0; i < kWave; ++i) {
    if (wave.lanes[i].done || !wave.lanes[i].parked) continue;
    wave.lanes[i].parked = false;
    --wave.parked;
  }
  current = lane;
  JaxAttnSwitchFiber(&scheduler, lane->stack_pointer);
}

void RunBlock(unsigned number) {
  for (char* p = __start_gpu_on_cpu_shared; p < __stop_gpu_on_cpu_shared; ++p) {
    *p = static_cast<char>(0xff);
  }
  std::fill_n(block.shared.get(), block.shared_bytes, static_cast<char>(0xff));
  std::fill_n(block.shared.get() + block.shared_bytes, kGuardBytes, kGuard);
  for (Lane& lane : block.lanes) Prepare(lane);
  for (Wave& wave : block.waves) wave.arrived = wave.parked = wave.done = 0;
  const size_t num_waves = block.waves.size();
  for (size_t round = number, running = num_waves; running > 0; ++round) {
    // In changing order, so that what a barrier is missing for shows.
    for (size_t i = 0; i < num_waves && failure.empty(); ++i) {
      Wave& wave = block.waves[round % 2 == 0 ? i : num_waves - 1 - i];
      if (wave.done < kWave) RunUntilParked(wave);
    }
    if (!failure.empty()) return;
    running = 0;
    for (const Wave& wave : block.waves) running += wave.done < kWave;
  }
  const char* const guard = block.shared.get() + block.shared_bytes;
  if (std::any_of(guard, guard + kGuardBytes, [](char x) { return x != kGuard; })) {
    failure = "a block wrote past its dynamic shared memory";
  }
}

void PrepareLanes(unsigned threads) {
  while (block.lanes.size() > threads) {
    munmap(block.lanes.back().stack, kStackBytes);
    block.lanes.pop_back();
  }
  while (block.lanes.size() < threads) {
    void* const stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    block.lanes.emplace_back().stack = static_cast<char*>(stack);
  }
  block.waves.assign(threads / kWave, Wave());
  for (unsigned i = 0; i < threads; ++i) {
    Lane& lane = block.lanes[i];
    lane.index = i;
    lane.thread =
        dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    if (i % kWave == 0) block.waves[i / kWave].lanes = &lane;
  }
}

}  // namespace

char* SharedMemory() { return block.shared.get(); }

void BlockBarrier() { Park(); }

const Slot* Exchange(Operation operation, const Slot& mine, void (*compute)(Slot*)) {
  Wave& wave = WaveOf(*current);
  if (wave.arrived > 0 && wave.operation != operation) {
    Fail("lanes of a wave are at different operations");
  }
  wave.operation = operation;
  Slot* const slots = wave.slots[wave.completed % 2];
  slots[LaneIndex()] = mine;
  if (++wave.arrived == kWave) {
    wave.arrived = 0;
    ++wave.completed;
    if (compute != nullptr) compute(slots);
    return slots;
  }
  for (const uint64_t before = wave.completed; wave.completed == before;) Yield(wave);
  return slots;
}

void Fail(const char* reason) {
  failure = std::string(reason) + " (block " + std::to_string(block_index.x) + ", thread " +
            std::to_string(current->index) + ")";
  BackToScheduler();
  __builtin_trap();
}

const void* Register(const void* kernel, Invoke invoke) {
  const std::lock_guard lock(mutex);
  Kernels()[kernel] = invoke;
  return kernel;
}

const char* Launch(const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes, void** args) {
  const std::lock_guard lock(mutex);
  static std::string last_failure;
  failure.clear();
  const unsigned num_threads = threads.x * threads.y * threads.z;
  const auto found = Kernels().find(kernel);
  if (found == Kernels().end()) {
    failure = "the kernel's address is not from KernelAddress";
  } else if (num_threads == 0 || num_threads > 1024 || num_threads % kWave != 0) {
    failure = "a block has whole waves, at most 1024 threads";
  } else if (shared_bytes > kMaxSharedBytes) {
    failure = "a block has at most 64 KiB of shared memory, static arrays among them";
  } else {
    block_size = threads;
    grid_size = grid;
    PrepareLanes(num_threads);
    block.shared = std::make_unique<char[]>(shared_bytes + kGuardBytes);
    block.shared_bytes = shared_bytes;
    block.kernel = kernel;
    block.invoke = found->second;
    block.args = args;
    // The last first: on a GPU they have no order, and a kernel that relies on one is found out.
    for (unsigned i = grid.x * grid.y * grid.z; i-- > 0 && failure.empty();) {
      block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
      RunBlock(i);
    }
  }
  last_failure = failure;
  return last_failure.empty() ? nullptr : last_failure.c_str();
}

}  // namespace gpu_on_cpu
