// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#ifndef JAX_ATTN_CSRC_CPU_SMALL_SEQ_ATTENTION_H_
#define JAX_ATTN_CSRC_CPU_SMALL_SEQ_ATTENTION_H_

#include <string>
#include <string_view>

#include "../small_seq_attention.h"
#include "parallel.h"

namespace jax_attn::cpu {

// Compute `p`, sequences in parallel; each is one thread's, so repeated calls give the same bits.
// `variant` names an instruction set, empty for the best. Return an error, or "".
std::string LaunchSmallSeqAttention(const SmallSeqAttentionParams& p, std::string_view variant,
                                    Executor& executor);
std::string LaunchSmallSeqBackward(const SmallSeqBackwardParams& p, std::string_view variant,
                                   Executor& executor);

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_SMALL_SEQ_ATTENTION_H_
