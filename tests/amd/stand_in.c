// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Stands in for libamdhip64: keeps count of what is registered and launched.

#include <stddef.h>
#include <string.h>

typedef struct {
  unsigned x, y, z;
} Dim3;

enum { kSuccess = 0, kInvalidDeviceFunction = 98, kMaxKernels = 1024 };

static const void* kernels[kMaxKernels];
static int num_kernels, num_launches, num_unregistered;
static void* module;

int StandInKernels(void) { return num_kernels; }
int StandInLaunches(void) { return num_launches; }

void** __hipRegisterFatBinary(const void* binary) {
  (void)binary;
  return &module;
}
void __hipRegisterFunction(void** handle, const void* kernel, char* device_name, const char* name,
                           unsigned thread_limit, void* thread, void* block, void* block_dim,
                           void* grid_dim, int* wave_size) {
  (void)device_name, (void)name, (void)thread_limit, (void)thread, (void)block, (void)block_dim;
  (void)grid_dim, (void)wave_size;
  if (handle == &module && num_kernels < kMaxKernels) kernels[num_kernels++] = kernel;
}
void __hipUnregisterFatBinary(void** handle) { num_unregistered += handle == &module; }

int hipGetDevice(int* device) { return *device = 0; }
int hipDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  *value = 64;
  return kSuccess;
}
int hipGetLastError(void) { return kSuccess; }
const char* hipGetErrorString(int error) {
  return error == kInvalidDeviceFunction ? "the kernel is not registered" : "no error";
}
int hipLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared_bytes,
                    void* stream) {
  (void)grid, (void)block, (void)args, (void)shared_bytes, (void)stream;
  for (int i = 0; i < num_kernels; ++i) {
    if (kernels[i] == kernel) return ++num_launches, kSuccess;
  }
  return kInvalidDeviceFunction;
}

int hipMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  (void)kind, (void)stream;
  memcpy(to, from, bytes);
  return kSuccess;
}

// For programs that CMake tries the compiler with.
int __hipPushCallConfiguration(void) { return kInvalidDeviceFunction; }
int __hipPopCallConfiguration(void) { return kInvalidDeviceFunction; }
