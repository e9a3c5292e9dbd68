// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#ifndef JAX_ATTN_CSRC_CPU_SPLIT_KV_ATTENTION_H_
#define JAX_ATTN_CSRC_CPU_SPLIT_KV_ATTENTION_H_

#include <string>
#include <string_view>
#include <vector>

#include "../split_kv_attention.h"
#include "parallel.h"
#include "split_kv_kernel.h"

namespace jax_attn::cpu {

// Instruction sets that this build has kernels for and this machine can run, best first.
std::vector<const SplitKvKernels*> AvailableSplitKvKernels();

// Computes `p`. Splits are computed in parallel, then merged in parallel; both in a fixed order of
// summation. `variant` names an instruction set, empty for the best. Returns an error, or "".
std::string LaunchSplitKvAttention(const SplitKvAttentionParams& p, std::string_view variant,
                                   Executor& executor);

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_SPLIT_KV_ATTENTION_H_
