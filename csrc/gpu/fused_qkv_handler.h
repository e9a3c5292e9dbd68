// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_HANDLER_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_HANDLER_H_

#include "vendor.h"
#include "xla/ffi/api/ffi.h"

#if JAX_ATTN_NVIDIA
#define JAX_ATTN_FUSED_QKV_HANDLER JaxAttnFusedQkvRopeCacheCuda
#else
#define JAX_ATTN_FUSED_QKV_HANDLER JaxAttnFusedQkvRopeCacheRocm
#endif

namespace jax_attn::gpu {

// The handler of the target "jax_attn_fused_qkv_rope_cache".
XLA_FFI_DECLARE_HANDLER_SYMBOL(JAX_ATTN_FUSED_QKV_HANDLER);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_HANDLER_H_
