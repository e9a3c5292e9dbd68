// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_ATTENTION_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_ATTENTION_H_

#include <string>
#include <string_view>

#include "../split_kv_attention.h"
#include "split_plan.h"
#include "vendor.h"

namespace jax_attn::gpu {

// Launches the kernels that compute `p` on `stream`, at most two of them, and nothing else. Sums
// are in an order that shapes, lengths and options decide. Returns an error, or "".
std::string LaunchSplitKvAttention(const SplitKvAttentionParams& p, std::string_view variant,
                                   const Device& device, Stream stream);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_ATTENTION_H_
