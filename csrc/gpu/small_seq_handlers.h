// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_HANDLERS_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_HANDLERS_H_

#include "vendor.h"
#include "xla/ffi/api/ffi.h"

#if JAX_ATTN_NVIDIA
#define JAX_ATTN_SMALL_SEQ_HANDLER JaxAttnSmallSeqAttentionCuda
#define JAX_ATTN_SMALL_SEQ_BACKWARD_HANDLER JaxAttnSmallSeqAttentionBackwardCuda
#else
#define JAX_ATTN_SMALL_SEQ_HANDLER JaxAttnSmallSeqAttentionRocm
#define JAX_ATTN_SMALL_SEQ_BACKWARD_HANDLER JaxAttnSmallSeqAttentionBackwardRocm
#endif

namespace jax_attn::gpu {

// The handlers of "jax_attn_small_seq_attention" and "jax_attn_small_seq_attention_backward".
XLA_FFI_DECLARE_HANDLER_SYMBOL(JAX_ATTN_SMALL_SEQ_HANDLER);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JAX_ATTN_SMALL_SEQ_BACKWARD_HANDLER);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_HANDLERS_H_
