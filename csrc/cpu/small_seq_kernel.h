// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Small-sequence attention on one CPU thread, compiled once per instruction set.

#ifndef JAX_ATTN_CSRC_CPU_SMALL_SEQ_KERNEL_H_
#define JAX_ATTN_CSRC_CPU_SMALL_SEQ_KERNEL_H_

#include <cstdint>

#include "../small_seq_attention.h"

namespace jax_attn::cpu {

// What one thread does at a time: sequences that follow each other, of one index of vmap.
struct SmallSeqItem {
  int64_t begin = 0;  // in the whole batch
  int64_t end = 0;
  // Where packed sequence `begin` starts.
  int64_t query_start = 0;
  int64_t kv_start = 0;
  bool around_caches = false;  // results are too large to be found in a cache later
  float* scratch = nullptr;    // of ScratchFloats
  // Elements from the first row of a kv head to row r, which is query r / group_size with head
  // r % group_size of the group; and from its first key to key j. For vectors of head_dim, and for
  // those of v_head_dim.
  const int32_t* row_offsets = nullptr;
  const int32_t* v_row_offsets = nullptr;
  const int32_t* key_offsets = nullptr;
  const int32_t* v_key_offsets = nullptr;
};

// The largest kv_len in the capability table.
inline constexpr int64_t kMaxKeys = 64;

// Logits of this many floats are worked on at a time; of a single kv head, if it has more. They and
// the operands that they are made of stay in the nearest caches.
inline constexpr int64_t kLogits = 4096;

// Rows of logits are padded to this many floats: a vector of the widest set.
inline constexpr int64_t kLogitsPadding = 16;

constexpr int64_t PaddedKeys(int64_t keys) {
  return (keys + kLogitsPadding - 1) / kLogitsPadding * kLogitsPadding;
}

// For the weights, and in the backward pass the gradients of the logits, of all rows of a kv head.
inline int64_t ScratchFloats(const SmallSeqProblem& p) {
  const int64_t logits = p.max_q_len * p.group_size() * PaddedKeys(p.max_kv_len);
  return 2 * (logits > kLogits ? logits : kLogits);
}

struct SmallSeqKernels {
  const char* name;
  void (*forward)(const SmallSeqAttentionParams&, const SmallSeqItem&);
  void (*backward)(const SmallSeqBackwardParams&, const SmallSeqItem&);
};

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_SMALL_SEQ_KERNEL_H_
