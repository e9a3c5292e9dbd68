// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Runs GPU kernels that were compiled as C++ for the CPU. Every thread of a block is a fiber;
// blocks run one after the other, and the lanes of a wave take turns between wave operations.
//
// All lanes of a wave must take part in each of its operations, as kernels promise
// (csrc/gpu/wave.h). A launch fails where they do not, where they are at different operations, and
// where a block writes past its shared memory. Shared memory is full of NaN when a block begins.

#ifndef JAX_ATTN_TESTS_GPU_ON_CPU_EMULATOR_H_
#define JAX_ATTN_TESTS_GPU_ON_CPU_EMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace gpu_on_cpu {

#if defined(__GFX9__)
inline constexpr unsigned kWave = 64;
#elif defined(__GFX11__) || defined(__GFX12__)
inline constexpr unsigned kWave = 32;
#else
#error "define the architecture to stand in for: __GFX9__, __GFX11__ or __GFX12__"
#endif

struct Lane {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 thread;
  unsigned index = 0;   // in the block
  bool parked = false;  // at a barrier of the block, or done
  bool done = false;
};

// The lane that runs, and where.
extern Lane* current;
extern dim3 block_index, block_size, grid_size;

inline unsigned LaneIndex() { return current->index % kWave; }

// Dynamic shared memory of the block.
char* SharedMemory();

void BlockBarrier();

// ---- Operations of a wave

enum class Operation { kFence, kShuffle, kVote, kMatrix };

// What a lane brings to an operation, and what it gets if the operation computes results.
struct alignas(16) Slot {
  unsigned char bytes[128];

  template <typename T>
  T As() const {
    T x;
    std::memcpy(&x, bytes, sizeof(T));
    return x;
  }
  template <typename T>
  void Set(const T& x) {
    static_assert(sizeof(T) <= sizeof(bytes) && std::is_trivially_copyable_v<T>);
    std::memcpy(bytes, &x, sizeof(T));
  }
};

// Waits until all lanes of the wave have brought `mine`, of which the last calls `compute`. Returns
// the slots of all lanes, which stay until the lane's next operation.
const Slot* Exchange(Operation operation, const Slot& mine, void (*compute)(Slot*) = nullptr);

template <typename T>
const Slot* Exchange(Operation operation, const T& mine, void (*compute)(Slot*) = nullptr) {
  Slot slot;
  slot.Set(mine);
  return Exchange(operation, slot, compute);
}

template <typename T>
T Shuffle(T x, unsigned from) {
  return Exchange(Operation::kShuffle, x)[from % kWave].template As<T>();
}

inline uint64_t Ballot(bool x) {
  const Slot* all = Exchange(Operation::kVote, x);
  uint64_t bits = 0;
  for (unsigned i = 0; i < kWave; ++i) bits |= uint64_t{all[i].As<bool>()} << i;
  return bits;
}

inline void WaveBarrier() { Exchange(Operation::kFence, 0); }

// Stops the launch. Only kernels may call it.
[[noreturn]] void Fail(const char* reason);

// ---- Launches

using Invoke = void (*)(const void* kernel, void** args);

// Makes a kernel known to Launch, which has no types of its parameters.
const void* Register(const void* kernel, Invoke invoke);

template <typename... Parameters>
const void* Register(void (*kernel)(Parameters...)) {
  const Invoke invoke = [](const void* kernel, void** args) {
    const auto call = reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(kernel));
    [&]<size_t... i>(std::index_sequence<i...>) {
      call(*static_cast<std::remove_cv_t<Parameters>*>(args[i])...);
    }(std::index_sequence_for<Parameters...>{});
  };
  return Register(reinterpret_cast<const void*>(kernel), invoke);
}

// Runs a kernel to its end. Returns why it failed, or null.
const char* Launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** args);

}  // namespace gpu_on_cpu

#endif  // JAX_ATTN_TESTS_GPU_ON_CPU_EMULATOR_H_
