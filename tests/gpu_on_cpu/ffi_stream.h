// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Lets a GPU handler be called on the CPU, where XLA has no stream to give it. Included before
// everything else in files that define handlers.

#ifndef JAX_ATTN_TESTS_GPU_ON_CPU_FFI_STREAM_H_
#define JAX_ATTN_TESTS_GPU_ON_CPU_FFI_STREAM_H_

#include <optional>

#include "hip/hip_runtime.h"
#include "xla/ffi/api/ffi.h"

namespace xla::ffi {

template <>
struct CtxDecoding<PlatformStream<hipStream_t>> {
  using Type = hipStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return nullptr;
  }
};

}  // namespace xla::ffi

#endif  // JAX_ATTN_TESTS_GPU_ON_CPU_FFI_STREAM_H_
