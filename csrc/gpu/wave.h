// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What the lanes of a wave do together, and what they do one by one in vendor-specific ways.
// Kernels use these, and assume nothing about the number of lanes but that 16 divides it.

#ifndef JAX_ATTN_CSRC_GPU_WAVE_H_
#define JAX_ATTN_CSRC_GPU_WAVE_H_

#include <cstdint>
#include <type_traits>

#include "vendor.h"

namespace jax_attn::gpu {

#define JAX_ATTN_DEVICE __device__ __forceinline__

// Lanes of a wave in device code. The host asks the device instead.
#if JAX_ATTN_NVIDIA || defined(__GFX10__) || defined(__GFX11__) || defined(__GFX12__)
inline constexpr int kWave = 32;
#else
inline constexpr int kWave = 64;
#endif

inline constexpr int kWaveBits = kWave == 32 ? 5 : 6;

inline constexpr float kInfinity = __builtin_huge_valf();

JAX_ATTN_DEVICE int Lane() { return static_cast<int>(threadIdx.x) % kWave; }

// A number that is the same in all lanes of a wave, where the compiler does not see that.
JAX_ATTN_DEVICE int Uniform(int x) {
#if defined(__AMDGCN__)
  return __builtin_amdgcn_readfirstlane(x);
#else
  return x;
#endif
}

JAX_ATTN_DEVICE int64_t Uniform(int64_t x) {
#if defined(__AMDGCN__)
  const uint32_t low = static_cast<uint32_t>(Uniform(static_cast<int>(x)));
  return static_cast<int64_t>(Uniform(static_cast<int>(x >> 32))) << 32 | low;
#else
  return x;
#endif
}

JAX_ATTN_DEVICE int WaveIndex() { return Uniform(static_cast<int>(threadIdx.x) / kWave); }

// ---- AMD's compiler moves what a loop needs in front of it, parameters and comparisons, until
// registers run out. These hide that it could.

inline constexpr bool kMovesAhead = !JAX_ATTN_NVIDIA;

// A uniform number that nothing is computed from ahead.
JAX_ATTN_DEVICE int Fresh(int x) {
#if defined(__AMDGCN__)
  x = Uniform(x);
  asm volatile("" : "+s"(x));
#endif
  return x;
}

JAX_ATTN_DEVICE bool Fresh(bool x) { return Fresh(static_cast<int>(x)) != 0; }

// The same for a number of a lane.
template <typename T>
JAX_ATTN_DEVICE T FreshOfLane(T x) {
#if defined(__AMDGCN__)
  asm volatile("" : "+v"(x));
#endif
  return x;
}

// Lanes' bits: they take two scalar registers where a wave has 64 lanes.
JAX_ATTN_DEVICE bool FreshOfLane(bool x) { return FreshOfLane(static_cast<int>(x)) != 0; }

// A parameter of a kernel, which is read again. `Before` are the types of those before it.
template <typename... Before, typename T>
JAX_ATTN_DEVICE const T& FreshParameter(const T& parameter) {
#if defined(__AMDGCN__)
  static_assert(((alignof(Before) >= alignof(T)) && ...));  // so that there are no gaps
  using Byte = const __attribute__((address_space(4))) char;
  Byte* parameters = (Byte*)__builtin_amdgcn_kernarg_segment_ptr();
  asm volatile("" : "+s"(parameters));
  (void)parameter;
  return *(const T*)(parameters + (sizeof(Before) + ... + 0));
#else
  return parameter;
#endif
}

template <typename T>
JAX_ATTN_DEVICE T ShuffleXor(T x, int mask) {
#if JAX_ATTN_NVIDIA
  return __shfl_xor_sync(0xffffffffu, x, mask);
#else
  return __shfl_xor(x, mask);
#endif
}

template <typename T>
JAX_ATTN_DEVICE T Broadcast(T x, int lane) {
#if JAX_ATTN_NVIDIA
  return __shfl_sync(0xffffffffu, x, lane);
#else
  return __shfl(x, lane);
#endif
}

// The largest of a wave.
JAX_ATTN_DEVICE int MaxOfWave(int x) {
#if JAX_ATTN_NVIDIA
  return __reduce_max_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int mask = 1; mask < kWave; mask *= 2) {
    const int other = ShuffleXor(x, mask);
    x = x > other ? x : other;
  }
  return x;
#endif
}

// The value of the lane `distance` before this one; its own in the first lanes.
template <typename T>
JAX_ATTN_DEVICE T ShuffleUp(T x, int distance) {
#if JAX_ATTN_NVIDIA
  return __shfl_up_sync(0xffffffffu, x, distance);
#else
  return __shfl_up(x, distance);
#endif
}

JAX_ATTN_DEVICE bool Any(bool x) {
#if JAX_ATTN_NVIDIA
  return __any_sync(0xffffffffu, x);
#else
  return __any(x);
#endif
}

// Bit i: what lane i says.
JAX_ATTN_DEVICE uint64_t Ballot(bool x) {
#if JAX_ATTN_NVIDIA
  return __ballot_sync(0xffffffffu, x);
#else
  return __ballot(x);
#endif
}

// Shared memory written by lanes of the wave before is seen by all of them after.
JAX_ATTN_DEVICE void WaveFence() {
#if JAX_ATTN_NVIDIA
  __syncwarp();
#else
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
#endif
}

// 2^x in one instruction; subnormal results are 0.
JAX_ATTN_DEVICE float Exp2(float x) {
#if JAX_ATTN_NVIDIA
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __builtin_amdgcn_exp2f(x);
#endif
}

// 1 / sqrt(x), to an ulp or two.
JAX_ATTN_DEVICE float InverseSqrt(float x) {
#if JAX_ATTN_NVIDIA
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  // The instruction takes no subnormal numbers.
  return x < 0x1p-96f ? __builtin_amdgcn_rsqf(x * 0x1p96f) * 0x1p48f : __builtin_amdgcn_rsqf(x);
#endif
}

// NaN if either is, unlike fmaxf: a NaN logit must not be lost.
JAX_ATTN_DEVICE float Max(float a, float b) {
#if JAX_ATTN_NVIDIA
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

// ---- Loads that begin early

// 16 bytes of an operand; zeros if they are not `wanted`, and nothing is read. Never by a branch,
// behind which the next load would wait for this one. `kLine`: the rest of the 128 bytes is asked
// for next.
template <bool kLine = false>
JAX_ATTN_DEVICE uint4 LoadIf(bool wanted, const void* from) {
  uint4 x = {0, 0, 0, 0};
#if JAX_ATTN_NVIDIA
  if constexpr (kLine) {
    asm("{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
        "@p ld.global.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
        : "l"(from), "r"(static_cast<int>(wanted)));
  } else {
    asm("{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
        "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
        : "l"(from), "r"(static_cast<int>(wanted)));
  }
#else
  if (wanted) x = *static_cast<const uint4*>(from);
#endif
  return x;
}

// A number that is read here and now, not where it is needed. NVIDIA's compiler moves reads to
// their use behind a branch.
JAX_ATTN_DEVICE int32_t LoadNow(const int32_t* from) {
#if JAX_ATTN_NVIDIA
  int32_t x;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(from));
  return x;
#else
  return *from;
#endif
}

// A value that is in registers: of some, one is chosen after all were read, not read by a chosen
// address, which NVIDIA's compiler would have to wait for.
template <typename T>
JAX_ATTN_DEVICE T InRegister(T x) {
#if JAX_ATTN_NVIDIA
  if constexpr (std::is_pointer_v<T>) {
    size_t address = __cvta_generic_to_global(x);
    asm("" : "+l"(address));
    return static_cast<T>(__cvta_global_to_generic(address));
  } else {
    static_assert(sizeof(T) == 4);
    asm("" : "+r"(x));
    return x;
  }
#else
  return x;
#endif
}

// Reads begin before this that are in front of it.
JAX_ATTN_DEVICE void BeginReads() {
#if JAX_ATTN_NVIDIA
  __syncwarp();
#else
  __builtin_amdgcn_sched_barrier(0);
#endif
}

// Nothing moves over this. AMD's compiler begins all loads as early as it can, which takes more
// registers than there are; NVIDIA's counts them.
JAX_ATTN_DEVICE void KeepOrder() {
#if !JAX_ATTN_NVIDIA
  __builtin_amdgcn_sched_barrier(0);
#endif
}

// ---- Kernels that follow each other

// Lets the next kernel of the stream start, if it was launched to overlap this one.
JAX_ATTN_DEVICE void AllowNextKernel() {
#if JAX_ATTN_NVIDIA && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

JAX_ATTN_DEVICE void WaitForPreviousKernel() {
#if JAX_ATTN_NVIDIA && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Copies from global to shared memory that run while lanes compute
//
// Copies are begun in batches. On NVIDIA they go straight to shared memory, and several batches are
// under way; on AMD one batch waits in registers until it is landed (kCopiesThroughRegisters).

// Words that are copied with one instruction. HIP's uint4 is a class that the compiler would keep
// in memory.
template <int kBytes>
struct Bytes {
#if JAX_ATTN_NVIDIA
  using Type = std::conditional_t<kBytes == 16, uint4, uint2>;
#else
  using Type = uint32_t __attribute__((ext_vector_type(kBytes / 4)));
#endif
};
template <>
struct Bytes<4> {
  using Type = uint32_t;
};

// The copies of a lane in one batch, at most kCount of kBytes each. Of these, kHeld wait in
// registers and the others begin when they land.
template <int kBytes, int kCount, int kHeld = kCount>
class Copies {
 public:
  static constexpr bool kLandReads = kCopiesThroughRegisters && kHeld < kCount;

  // Begins copy `i`; zeros are stored if it is not `wanted`, and nothing is read.
  JAX_ATTN_DEVICE void Begin(int i, void* to, const void* from, bool wanted) {
#if JAX_ATTN_NVIDIA
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const int size = wanted ? kBytes : 0;
    (void)i;
    if constexpr (kBytes == 16) {
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address),
                   "l"(from), "r"(size)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
                   "n"(kBytes), "r"(size)
                   : "memory");
    }
#else
    (void)to;
    if (i < kHeld) held_[i] = Load(from, wanted);
#endif
  }

  // Stores copy `i`, which began with the same arguments; nothing to do where it went to shared
  // memory by itself.
  JAX_ATTN_DEVICE void Land(int i, void* to, const void* from, bool wanted) const {
#if JAX_ATTN_NVIDIA
    (void)i;
    (void)to;
    (void)from;
    (void)wanted;
#else
    *static_cast<Type*>(to) = i < kHeld ? held_[i] : Load(from, wanted);
#endif
  }

 private:
#if !JAX_ATTN_NVIDIA
  using Type = typename Bytes<kBytes>::Type;

  static JAX_ATTN_DEVICE Type Load(const void* from, bool wanted) {
    Type x = {};
    if (wanted) x = *static_cast<const Type*>(from);
    return x;
  }

  Type held_[kHeld > 0 ? kHeld : 1];
#endif
};

JAX_ATTN_DEVICE void EndBatch() {
#if JAX_ATTN_NVIDIA
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending batches are under way.
template <int kPending>
JAX_ATTN_DEVICE void WaitForBatches() {
#if JAX_ATTN_NVIDIA
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_WAVE_H_
