// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Stands in for HIP's header of this name: what csrc/gpu uses of HIP, on the emulator.

#ifndef JAX_ATTN_TESTS_GPU_ON_CPU_HIP_RUNTIME_H_
#define JAX_ATTN_TESTS_GPU_ON_CPU_HIP_RUNTIME_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../emulator.h"
#include "../matrix_instructions.h"

// ---- Declarations

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __forceinline__ inline
#define __shared__ static GPU_ON_CPU_SHARED
#ifdef GPU_ON_CPU_SANITIZE  // which leaves out what is in a section of its own
#define GPU_ON_CPU_SHARED
#else
#define GPU_ON_CPU_SHARED __attribute__((section("gpu_on_cpu_shared")))
#endif
#define HIP_DYNAMIC_SHARED(type, name) char* const name = gpu_on_cpu::SharedMemory();

#define threadIdx (gpu_on_cpu::current->thread)
#define blockIdx (gpu_on_cpu::block_index)
#define blockDim (gpu_on_cpu::block_size)
#define gridDim (gpu_on_cpu::grid_size)

// ---- Types and arithmetic

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

inline int __ffsll(unsigned long long x) { return __builtin_ffsll(static_cast<long long>(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline float __builtin_amdgcn_exp2f_on_cpu(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
#define __builtin_amdgcn_exp2f __builtin_amdgcn_exp2f_on_cpu
#define __builtin_amdgcn_rsqf rsqrtf

// Lanes take turns, so no other is between the two halves of these.
inline int atomicCAS(int* at, int expected, int desired) {
  const int old = *at;
  if (old == expected) *at = desired;
  return old;
}
inline uint32_t atomicOr(uint32_t* at, uint32_t x) {
  const uint32_t old = *at;
  *at = old | x;
  return old;
}
inline int atomicMax(int* at, int x) {
  const int old = *at;
  *at = max(old, x);
  return old;
}

// ---- Waves and blocks

inline void __syncthreads() { gpu_on_cpu::BlockBarrier(); }
#define __builtin_amdgcn_fence(order, scope) ((void)0)
#define __builtin_amdgcn_sched_barrier(mask) ((void)0)
#define __builtin_amdgcn_wave_barrier() gpu_on_cpu::WaveBarrier()

template <typename T>
T __shfl(T x, int lane) {
  return gpu_on_cpu::Shuffle(x, static_cast<unsigned>(lane));
}
template <typename T>
T __shfl_xor(T x, int mask) {
  return gpu_on_cpu::Shuffle(x, gpu_on_cpu::LaneIndex() ^ static_cast<unsigned>(mask));
}
template <typename T>
T __shfl_up(T x, int distance) {
  const unsigned lane = gpu_on_cpu::LaneIndex(), by = static_cast<unsigned>(distance);
  return gpu_on_cpu::Shuffle(x, lane < by ? lane : lane - by);
}
template <typename T>
T __shfl_down(T x, int distance) {
  const unsigned lane = gpu_on_cpu::LaneIndex(), from = lane + static_cast<unsigned>(distance);
  return gpu_on_cpu::Shuffle(x, from < gpu_on_cpu::kWave ? from : lane);
}
inline uint64_t __ballot(bool x) { return gpu_on_cpu::Ballot(x); }
inline bool __any(bool x) { return gpu_on_cpu::Ballot(x) != 0; }
inline bool __all(bool x) { return gpu_on_cpu::Ballot(!x) == 0; }

// ---- The runtime: one small device, streams that are always idle

struct GpuOnCpuStream;
using hipStream_t = GpuOnCpuStream*;
enum hipError_t { hipSuccess = 0, hipErrorLaunchFailure = 719 };
enum hipDeviceAttribute_t {
  hipDeviceAttributeMultiprocessorCount,
  hipDeviceAttributeWarpSize,
  hipDeviceAttributeMaxSharedMemoryPerMultiprocessor,
  hipDeviceAttributeMaxSharedMemoryPerBlock,
};

namespace gpu_on_cpu {
inline const char* last_error = "no error";
}

inline const char* hipGetErrorString(hipError_t) { return gpu_on_cpu::last_error; }
inline hipError_t hipGetLastError() { return hipSuccess; }
inline hipError_t hipGetDevice(int* device) {
  *device = 0;
  return hipSuccess;
}
inline hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t attribute, int) {
  // Few cores, so that small problems are cut as large ones are.
  constexpr int kValues[] = {5, gpu_on_cpu::kWave, 64 * 1024, 64 * 1024};
  *value = kValues[attribute];
  return hipSuccess;
}
enum hipMemcpyKind { hipMemcpyDeviceToDevice };
inline hipError_t hipMemcpyAsync(void* to, const void* from, size_t bytes, hipMemcpyKind,
                                 hipStream_t) {
  std::memcpy(to, from, bytes);
  return hipSuccess;
}
inline hipError_t hipLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args,
                                  size_t shared_bytes, hipStream_t) {
  const char* const failure = gpu_on_cpu::Launch(kernel, grid, block, shared_bytes, args);
  if (failure != nullptr) gpu_on_cpu::last_error = failure;
  return failure == nullptr ? hipSuccess : hipErrorLaunchFailure;
}

#endif  // JAX_ATTN_TESTS_GPU_ON_CPU_HIP_RUNTIME_H_
