// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// One pass over the packed QKV projection: the problem that every backend is given.

#ifndef JAX_ATTN_CSRC_FUSED_QKV_ROPE_CACHE_H_
#define JAX_ATTN_CSRC_FUSED_QKV_ROPE_CACHE_H_

#include <cstdint>

#include "dtype.h"
#include "operands.h"

namespace jax_attn {

// Where the columns of the gate are; see `gate` in the public docstring.
enum class GateLayout : int32_t { kNone = 0, kInterleaved = 1, kBlocked = 2 };

// What a mean square is taken over.
enum class NormScope : int32_t { kNone = 0, kHead = 1, kAllHeads = 2 };

// Weights of a norm, or a table of cosines or sines.
struct FloatOperand {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  BatchStrides batch;
};

// Pages of keys or values, updated in place. The pools of all batch indices follow each other.
struct PagesOperand {
  void* data = nullptr;
  const void* source = nullptr;  // what they hold before; differs from data if not aliased
  DType dtype = DType::kFloat32;
  int64_t batch_stride = 0;
  int64_t layer_stride = 0;
  int64_t page_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// Scales that are written: one for each stored row, addressed like the rows.
struct DynamicScales {
  float* data = nullptr;  // null: scales are given, or there are none
  const float* source = nullptr;
  int64_t batch_stride = 0;
};

struct FusedQkvRopeCacheParams {
  BatchShape batch;  // dimensions of vmap
  int64_t num_tokens = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t v_head_dim = 0;
  int64_t num_layers = 0;  // 0: no layer axis
  int64_t num_pages = 0;
  int64_t page_size = 0;

  const void* qkv = nullptr;  // [tokens, columns]
  DType dtype = DType::kFloat32;
  BatchStrides qkv_batch;
  Operand<int32_t> slots_32;   // [tokens]; one of the two is given
  Operand<int64_t> slots_64;   // [tokens]
  Operand<int32_t> layer;      // []
  Operand<int32_t> positions;  // [tokens], or [3, tokens] with M-RoPE sections
  Operand<int32_t> offsets;    // [tokens]
  FloatOperand cos;            // [max_positions, table_width]
  FloatOperand sin;
  FloatOperand q_weight;  // [head_dim], or [num_q_heads, head_dim] over all heads
  FloatOperand k_weight;
  ScaleOperand k_scale;
  ScaleOperand v_scale;
  PagesOperand k_pages;
  PagesOperand v_pages;
  DynamicScales k_scales_out;
  DynamicScales v_scales_out;

  GateLayout gate = GateLayout::kNone;
  int64_t rotary_dim = 0;  // 0: no rotation
  bool interleaved = false;
  bool nope_first = false;
  bool full_width_table = false;
  int64_t max_positions = 0;
  int64_t table_width = 0;
  bool has_mrope = false;
  bool mrope_interleaved = false;
  int64_t mrope_sections[3] = {};
  NormScope norm_scope = NormScope::kNone;
  bool normalize_v = false;
  float epsilon = 0;
  float weight_offset = 0;

  // [batch, tokens, heads, head_dim], dtype of qkv.
  void* query = nullptr;
  void* gate_out = nullptr;
  void* key = nullptr;
  void* value = nullptr;

  int64_t query_columns() const {
    return num_q_heads * head_dim * (gate == GateLayout::kNone ? 1 : 2);
  }
  int64_t columns() const { return query_columns() + num_kv_heads * (head_dim + v_head_dim); }
  // What a token is cut into: query heads (with their gates), keys, values.
  int64_t num_units() const { return num_q_heads + 2 * num_kv_heads; }
};

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_FUSED_QKV_ROPE_CACHE_H_
