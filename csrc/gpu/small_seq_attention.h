// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_ATTENTION_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_ATTENTION_H_

#include <string>
#include <string_view>

#include "../small_seq_attention.h"
#include "vendor.h"

namespace jax_attn::gpu {

inline constexpr std::string_view kSmallSeqVector = "vector";
inline constexpr std::string_view kSmallSeqMatrix = "matrix";

// Which of them computes `p`: `variant`, or if that is empty the better one.
std::string_view SmallSeqVariant(const SmallSeqProblem& p, std::string_view variant, bool backward);

// Launch the kernel that computes `p` on `stream`, and nothing else. A kv head of a sequence is
// done by one team of lanes, so repeated calls give the same bits. Return an error, or "".
std::string LaunchSmallSeqAttention(const SmallSeqAttentionParams& p, std::string_view variant,
                                    const Device& device, Stream stream);
std::string LaunchSmallSeqBackward(const SmallSeqBackwardParams& p, std::string_view variant,
                                   const Device& device, Stream stream);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_ATTENTION_H_
