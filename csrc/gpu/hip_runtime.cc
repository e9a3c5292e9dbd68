// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The functions of libamdhip64 that this module calls, in place of a link to it: the module loads
// where there is no AMD GPU, and a launch goes to the copy of the library that the process has,
// which is XLA's. A stream means nothing to another copy.
//
// Clang registers kernels when the module is loaded, before the library is looked for. What it says
// is kept until then.

#include <dlfcn.h>
#include <hip/hip_runtime.h>

#include <deque>
#include <string>

// What code that Clang generates calls, and no header declares.
extern "C" {
hipError_t __hipPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                     hipStream_t* stream);
void** __hipRegisterFatBinary(const void* binary);
void __hipRegisterFunction(void** module, const void* kernel, char* device_name, const char* name,
                           unsigned thread_limit, void* thread, void* block, void* block_dim,
                           void* grid_dim, int* wave_size);
void __hipUnregisterFatBinary(void** module);
}

namespace {

constexpr const char* kLibraries[] = {"libamdhip64.so.7", "libamdhip64.so.6"};

struct Kernel {
  const void* kernel;
  char* device_name;
  const char* name;
  unsigned thread_limit;
};

struct Module {
  const void* binary = nullptr;
  std::deque<Kernel> kernels;
  void** registered = nullptr;  // by the library
};

// Modules register and unregister while static objects are made and destroyed, in any order.
std::deque<Module>& Modules() {
  static auto* const modules = new std::deque<Module>;
  return *modules;
}

void* OpenLibrary() {
  // The one that is there already, whatever its version; only then one that is found.
  for (int mode : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
    for (const char* name : kLibraries) {
      if (void* const library = dlopen(name, mode)) return library;
    }
  }
  return nullptr;
}

// A function of the library; null if there is no library or it lacks the function.
template <typename Function>
Function* Find(void* library, Function*, const char* name) {
  return library == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library, name));
}

class Runtime {
 public:
  // Opens the library and registers all kernels with it, once.
  static const Runtime& Get() {
    static const Runtime runtime;
    return runtime;
  }

#define FUNCTION(name) decltype(&::name) name = Find(library_, &::name, #name)
 private:
  void* library_ = OpenLibrary();

 public:
  FUNCTION(hipDeviceGetAttribute);
  FUNCTION(hipGetDevice);
  FUNCTION(hipGetErrorString);
  FUNCTION(hipGetLastError);
  FUNCTION(hipLaunchKernel);
  FUNCTION(hipMemcpyAsync);
  FUNCTION(__hipUnregisterFatBinary);
  bool found = false;

 private:
  FUNCTION(__hipRegisterFatBinary);
  FUNCTION(__hipRegisterFunction);
#undef FUNCTION

  Runtime() {
    found = hipDeviceGetAttribute && hipGetDevice && hipGetErrorString && hipGetLastError &&
            hipLaunchKernel && hipMemcpyAsync && __hipRegisterFatBinary && __hipRegisterFunction;
    if (!found) return;
    for (Module& module : Modules()) {
      module.registered = __hipRegisterFatBinary(module.binary);
      for (const Kernel& k : module.kernels) {
        __hipRegisterFunction(module.registered, k.kernel, k.device_name, k.name, k.thread_limit,
                              nullptr, nullptr, nullptr, nullptr, nullptr);
      }
    }
  }
};

}  // namespace

// Hidden, so that nobody else in the process gets these for the library's, nor the module the
// library's for these. HIP's header declares them to be visible, which an attribute cannot undo.
asm(".hidden __hipPopCallConfiguration, __hipRegisterFatBinary, __hipRegisterFunction");
asm(".hidden __hipUnregisterFatBinary, hipDeviceGetAttribute, hipGetDevice, hipGetErrorString");
asm(".hidden hipGetLastError, hipLaunchKernel, hipMemcpyAsync");

extern "C" {

void** __hipRegisterFatBinary(const void* binary) {
  Modules().emplace_back().binary = binary;
  return reinterpret_cast<void**>(&Modules().back());
}

void __hipRegisterFunction(void** module, const void* kernel, char* device_name, const char* name,
                           unsigned thread_limit, void*, void*, void*, void*, int*) {
  reinterpret_cast<Module*>(module)->kernels.push_back({kernel, device_name, name, thread_limit});
}

void __hipUnregisterFatBinary(void** module) {
  void** const registered = reinterpret_cast<Module*>(module)->registered;
  if (registered != nullptr) Runtime::Get().__hipUnregisterFatBinary(registered);
}

hipError_t hipGetDevice(int* device) {
  const Runtime& runtime = Runtime::Get();
  return runtime.found ? runtime.hipGetDevice(device) : hipErrorSharedObjectInitFailed;
}

hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t attribute, int device) {
  const Runtime& runtime = Runtime::Get();
  return runtime.found ? runtime.hipDeviceGetAttribute(value, attribute, device)
                       : hipErrorSharedObjectInitFailed;
}

hipError_t hipGetLastError() {
  const Runtime& runtime = Runtime::Get();
  return runtime.found ? runtime.hipGetLastError() : hipSuccess;
}

const char* hipGetErrorString(hipError_t error) {
  const Runtime& runtime = Runtime::Get();
  if (runtime.found) return runtime.hipGetErrorString(error);
  return "libamdhip64.so.7 or libamdhip64.so.6, of ROCm, is not loaded and cannot be found";
}

// For launches by <<<>>>, of which there are none.
hipError_t __hipPopCallConfiguration(dim3*, dim3*, size_t*, hipStream_t*) {
  return hipErrorNotSupported;
}

hipError_t hipLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args,
                           size_t shared_bytes, hipStream_t stream) {
  const Runtime& runtime = Runtime::Get();
  return runtime.found ? runtime.hipLaunchKernel(kernel, grid, block, args, shared_bytes, stream)
                       : hipErrorSharedObjectInitFailed;
}

hipError_t hipMemcpyAsync(void* to, const void* from, size_t bytes, hipMemcpyKind kind,
                          hipStream_t stream) {
  const Runtime& runtime = Runtime::Get();
  return runtime.found ? runtime.hipMemcpyAsync(to, from, bytes, kind, stream)
                       : hipErrorSharedObjectInitFailed;
}

}  // extern "C"
