// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// CUDA and HIP under one set of names. The only file that includes a vendor's headers.

#ifndef JAX_ATTN_CSRC_GPU_VENDOR_H_
#define JAX_ATTN_CSRC_GPU_VENDOR_H_

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)
#define JAX_ATTN_NVIDIA 0
#include <hip/hip_runtime.h>
#else
#define JAX_ATTN_NVIDIA 1
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace jax_attn::gpu {

#if JAX_ATTN_NVIDIA
inline constexpr char kPlatform[] = "cuda";
using Stream = cudaStream_t;
using Error = cudaError_t;
inline constexpr Error kSuccess = cudaSuccess;
inline const char* ErrorString(Error error) { return cudaGetErrorString(error); }
// Clears what a failed call leaves behind for the next one that asks.
inline void ClearLastError() { (void)cudaGetLastError(); }
inline constexpr bool kCopiesThroughRegisters = false;
inline constexpr bool kOverlapsKernels = true;  // where the device can: LaunchShape
inline constexpr int kMatrixRows[] = {8, 16};   // query rows of a block
inline constexpr int kSmallestTile = 8;         // rows that matrix instructions take at least
inline constexpr bool kManyRegisters = true;    // for unrolled loops
// A kernel parameter that is read where it was passed, not copied first.
#define JAX_ATTN_PARAMETER const __grid_constant__
// Threads of a block, and how many blocks a core should have room for. HIP counts waves instead,
// and spills registers for them.
#define JAX_ATTN_LAUNCH_BOUNDS(threads, ...) __launch_bounds__(threads, __VA_ARGS__)
// Shared memory whose size the launch decides.
#define JAX_ATTN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#else
inline constexpr char kPlatform[] = "rocm";
using Stream = hipStream_t;
using Error = hipError_t;
inline constexpr Error kSuccess = hipSuccess;
inline const char* ErrorString(Error error) { return hipGetErrorString(error); }
inline void ClearLastError() { (void)hipGetLastError(); }
inline constexpr bool kCopiesThroughRegisters = true;
inline constexpr bool kOverlapsKernels = false;
inline constexpr int kMatrixRows[] = {16, 32};
inline constexpr int kSmallestTile = 16;
inline constexpr bool kManyRegisters = false;
#define JAX_ATTN_PARAMETER const
#define JAX_ATTN_LAUNCH_BOUNDS(threads, ...) __launch_bounds__(threads)
#define JAX_ATTN_DYNAMIC_SHARED(name) HIP_DYNAMIC_SHARED(__align__(16) char, name)
#endif

// What plans depend on.
struct Device {
  int num_cores = 132;  // SMs or CUs
  int wave_size = 32;
  int64_t shared_per_core = 228 * 1024;
  int64_t shared_per_block = 227 * 1024;
  bool tensor_maps = JAX_ATTN_NVIDIA;  // copies through tensor maps
};

#if JAX_ATTN_NVIDIA
using TensorMap = CUtensorMap;
using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time so that nothing links to the driver. Null without it.
inline EncodeTensorMap FindEncodeTensorMap() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const Error error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                       cudaEnableDefault, &found);
  if (error != cudaSuccess) ClearLastError();
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<EncodeTensorMap>(function)
             : nullptr;
}
#else
struct alignas(64) TensorMap {
  uint64_t words[16];
};
#endif

// A tensor of lines of 64 or 128 bytes.
struct TensorShape {
  const void* data = nullptr;
  uint32_t line_bytes = 128;
  uint64_t sizes[4] = {};    // of the dimensions, in lines
  uint64_t strides[4] = {};  // bytes
  uint32_t box[4] = {};      // what one copy takes of them
};

// Describes a tensor for copies that scatter pieces of 16 bytes over the banks of shared memory:
// see TensorCopy. Whether that is possible.
inline bool MakeTensorMap(const TensorShape& shape, TensorMap& map) {
#if JAX_ATTN_NVIDIA
  static const EncodeTensorMap encode = FindEncodeTensorMap();
  if (encode == nullptr) return false;
  cuuint64_t sizes[5] = {shape.line_bytes / 2}, strides[4];
  cuuint32_t box[5] = {shape.line_bytes / 2}, steps[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    sizes[i + 1] = shape.sizes[i];
    strides[i] = shape.strides[i];
    box[i + 1] = shape.box[i];
  }
  // Asking L2 for more than a copy needs makes it 10 % slower, unless that is the other half of a
  // line, for the neighbour's copy.
  const bool halves = shape.line_bytes == 64;
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, const_cast<void*>(shape.data), sizes,
                strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                halves ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                halves ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_NONE,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  (void)shape;
  (void)map;
  return false;
#endif
}

// The current device; an error leaves `device` as it is, that of a usual machine.
inline Error GetDevice(Device& device) {
  int index = 0, cores = 0, wave = 0, per_core = 0, per_block = 0, major = 0;
#if JAX_ATTN_NVIDIA
  Error error = cudaGetDevice(&index);
  const std::pair<int*, cudaDeviceAttr> attributes[] = {
      {&cores, cudaDevAttrMultiProcessorCount},
      {&wave, cudaDevAttrWarpSize},
      {&per_core, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&major, cudaDevAttrComputeCapabilityMajor}};
  for (const auto& [value, attribute] : attributes) {
    if (error == kSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  }
#else
  Error error = hipGetDevice(&index);
  const std::pair<int*, hipDeviceAttribute_t> attributes[] = {
      {&cores, hipDeviceAttributeMultiprocessorCount},
      {&wave, hipDeviceAttributeWarpSize},
      {&per_core, hipDeviceAttributeMaxSharedMemoryPerMultiprocessor},
      {&per_block, hipDeviceAttributeMaxSharedMemoryPerBlock}};
  for (const auto& [value, attribute] : attributes) {
    if (error == kSuccess) error = hipDeviceGetAttribute(value, attribute, index);
  }
#endif
  if (error != kSuccess) {
    ClearLastError();
    return error;
  }
  device.num_cores = cores;
  device.wave_size = wave;
  device.shared_per_core = per_core;
  device.shared_per_block = per_block;
  device.tensor_maps = JAX_ATTN_NVIDIA && major >= 9;
  return kSuccess;
}

struct LaunchShape {
  unsigned blocks = 0;
  unsigned threads = 0;
  size_t shared_bytes = 0;
  // The kernel may start before the previous one of the stream ends, and waits for it by itself
  // (WaitForPreviousKernel). Where the device cannot do that it starts afterwards.
  bool overlaps_previous = false;
  unsigned cluster = 1;  // blocks that run at the same time and see each other's shared memory
};

// The address of a kernel, as Launch takes it.
template <typename... Parameters>
const void* KernelAddress(void (*kernel)(Parameters...)) {
#ifdef JAX_ATTN_GPU_ON_CPU  // tests/gpu_on_cpu calls it by its type
  return gpu_on_cpu::Register(kernel);
#else
  return reinterpret_cast<const void*>(kernel);
#endif
}

// Launches on the given stream; nothing else, so that the call can be captured in a graph.
inline Error Launch(const void* kernel, const LaunchShape& shape, Stream stream, void** args) {
#if JAX_ATTN_NVIDIA
  // Up to 48 KiB need no permission, but static arrays of the kernel count among them.
  if (shape.shared_bytes > 32 * 1024) {
    const Error error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shape.shared_bytes));
    if (error != kSuccess) {
      ClearLastError();
      return error;
    }
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.overlaps_previous) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {shape.cluster, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const Error error = cudaLaunchKernelExC(&config, kernel, args);
#else
  const Error error = hipLaunchKernel(kernel, dim3(shape.blocks), dim3(shape.threads), args,
                                      shape.shared_bytes, stream);
#endif
  if (error != kSuccess) ClearLastError();
  return error;
}

// Copies between buffers of the device, in order with the launches of the stream.
inline Error CopyOnDevice(void* to, const void* from, size_t bytes, Stream stream) {
#if JAX_ATTN_NVIDIA
  const Error error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
#else
  const Error error = hipMemcpyAsync(to, from, bytes, hipMemcpyDeviceToDevice, stream);
#endif
  if (error != kSuccess) ClearLastError();
  return error;
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_VENDOR_H_
