// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Attention within pairs of very short sequences: the problems that every backend is given.

#ifndef JAX_ATTN_CSRC_SMALL_SEQ_ATTENTION_H_
#define JAX_ATTN_CSRC_SMALL_SEQ_ATTENTION_H_

#include <cstdint>

#include "dtype.h"
#include "operands.h"

namespace jax_attn {

// [T, N, H] or [S, K, H] of each sequence. Packed: of each index of vmap, with T or S the number of
// all tokens, so that the stride of the sequence dimension is 0.
struct TokenOperand {
  const void* data = nullptr;
  BatchStrides batch;
};

// What forward and backward have in common.
struct SmallSeqProblem {
  BatchShape batch;          // the last dimension is the sequence
  int64_t max_q_len = 0;     // T
  int64_t max_kv_len = 0;    // S
  int64_t query_tokens = 0;  // in a packed array; dense: T
  int64_t kv_tokens = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t v_head_dim = 0;
  DType dtype = DType::kFloat32;

  TokenOperand query;
  TokenOperand key;
  TokenOperand value;
  RowOperand bias;
  Operand<int32_t> query_lengths;  // clipped to the room that there is
  Operand<int32_t> kv_lengths;
  Operand<int32_t> query_cu_seqlens;  // [B + 1]; absent: dense
  Operand<int32_t> kv_cu_seqlens;

  float scale = 1;
  Causal causal = Causal::kNone;
  float logits_soft_cap = 0;  // 0: none

  // constexpr so that device code may call them.
  constexpr int64_t group_size() const { return num_q_heads / num_kv_heads; }
  constexpr bool packed() const { return query_cu_seqlens.data != nullptr; }
  constexpr int64_t num_sequences() const { return batch.sizes[batch.num_dims - 1]; }
};

struct SmallSeqAttentionParams : SmallSeqProblem {
  void* out = nullptr;   // [batch, T, N, Hv], or [vmap, tokens, N, Hv]
  float* lse = nullptr;  // without Hv, natural logarithm
};

struct SmallSeqBackwardParams : SmallSeqProblem {
  Operand<float> lse;
  TokenOperand dout;
  Operand<float> dlse;  // may be absent

  // Like the operands, with all batch dimensions; every element is written.
  void* dquery = nullptr;
  void* dkey = nullptr;
  void* dvalue = nullptr;
  float* dbias = nullptr;  // [batch, N, T, S]; null: no bias
};

// The bounds of packed sequences are read in order. Those that leave the array or decrease are
// clipped and raised to the one before, so that sequences never overlap.
constexpr int64_t ClippedBound(int64_t previous, int64_t bound, int64_t num_tokens) {
  const int64_t inside = bound > num_tokens ? num_tokens : bound;
  return inside > previous ? inside : previous;
}

// Keys that query `t` sees: those before this position.
constexpr int64_t VisibleEnd(const SmallSeqProblem& p, int64_t query_len, int64_t kv_len,
                             int64_t t) {
  int64_t end = kv_len;
  if (p.causal == Causal::kTopLeft) end = t + 1;
  if (p.causal == Causal::kBottomRight) end = kv_len - query_len + t + 1;
  return end < 0 ? 0 : end > kv_len ? kv_len : end;
}

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_SMALL_SEQ_ATTENTION_H_
