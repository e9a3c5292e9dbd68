// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#ifndef JAX_ATTN_CSRC_CPU_FUSED_QKV_ROPE_CACHE_H_
#define JAX_ATTN_CSRC_CPU_FUSED_QKV_ROPE_CACHE_H_

#include <string>
#include <string_view>

#include "../fused_qkv_rope_cache.h"
#include "parallel.h"

namespace jax_attn::cpu {

// Computes `p` in parallel; the result does not depend on the number of threads. `variant` names
// an instruction set, empty for the best. Returns an error, or "".
std::string LaunchFusedQkvRopeCache(const FusedQkvRopeCacheParams& p, std::string_view variant,
                                    Executor& executor);

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_FUSED_QKV_ROPE_CACHE_H_
