// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Attention over a dense or paged KV cache: the problem that every backend is given.

#ifndef JAX_ATTN_CSRC_SPLIT_KV_ATTENTION_H_
#define JAX_ATTN_CSRC_SPLIT_KV_ATTENTION_H_

#include <cstdint>

#include "dtype.h"
#include "operands.h"

namespace jax_attn {

// Keys or values. Dense tensors have no pages: page_stride and layer_stride are 0.
struct KvOperand {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  BatchStrides batch;
  int64_t layer_stride = 0;
  int64_t page_stride = 0;
  int64_t token_stride = 0;  // between tokens, inside a page if there are pages
  int64_t head_stride = 0;
};

struct SplitKvAttentionParams {
  BatchShape batch;
  int64_t query_len = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t v_head_dim = 0;
  int64_t kv_len = 0;     // keys that fit in a context; lengths are clipped to it
  int64_t page_size = 0;  // 0: dense
  int64_t num_pages = 0;
  int64_t num_layers = 0;  // 0: no layer axis

  const void* query = nullptr;  // [T, N, H] of each batch index
  DType query_dtype = DType::kFloat32;
  BatchStrides query_batch;
  KvOperand key;
  KvOperand value;
  RowOperand bias;
  RowOperand mask;  // one byte an entry, 0 hides the key
  Operand<int32_t> kv_lengths;
  Operand<int32_t> query_offset;  // []: position of the first query, counted from the first key
  Operand<int32_t> page_table;    // [M]
  Operand<int32_t> layer;         // []
  Operand<float> alibi_slopes;    // [N]
  Operand<float> sinks;           // [N]
  ScaleOperand k_scale;
  ScaleOperand v_scale;

  float scale = 1;
  Causal causal = Causal::kNone;
  int64_t sliding_window = 0;  // 0: none
  float logits_soft_cap = 0;   // 0: none
  int64_t num_splits = 0;      // 0: planned
  int64_t split_size = 0;      // 0: planned
  bool lse_includes_sinks = true;

  void* out = nullptr;         // [batch, T, N, Hv], dtype of query
  float* lse = nullptr;        // [batch, T, N], natural logarithm
  float* workspace = nullptr;  // partial results of splits
  int64_t workspace_size = 0;  // floats

  constexpr int64_t group_size() const { return num_q_heads / num_kv_heads; }
};

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_SPLIT_KV_ATTENTION_H_
