// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_ROPE_CACHE_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_ROPE_CACHE_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "../fused_qkv_rope_cache.h"
#include "vendor.h"

namespace jax_attn::gpu {

// How the pass is cut; the results do not depend on it.
struct FusedQkvPlan {
  int threads = 128;     // of a block; kFew has its own
  int piece_size = 8;    // elements that a lane reads at once where tokens are few
  int steps = 1;         // heads of a group of lanes, in kernels that are not plain
  int block_tokens = 0;  // of blocks that store together; 0: each wave for itself
  int item_tokens = 0;   // of the other blocks of plain kernels, if there are such blocks
};

FusedQkvPlan PlanFusedQkv(const FusedQkvRopeCacheParams& p, const Device& device);

// What the kernels compute with; see `variants` of the module.
inline constexpr std::string_view kFusedQkvVariant = "vector";

// Launches one kernel that computes `p` on `stream`, after copies of what XLA did not alias.
// Returns an error, or "". `variant` is empty or kFusedQkvVariant: no others are to be chosen from.
std::string LaunchFusedQkvRopeCache(const FusedQkvRopeCacheParams& p, std::string_view variant,
                                    const Device& device, Stream stream);

// The same with a plan at hand, without copies.
std::string LaunchFusedQkvPlan(const FusedQkvRopeCacheParams& p, const FusedQkvPlan& plan,
                               const Device& device, Stream stream);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_ROPE_CACHE_H_
