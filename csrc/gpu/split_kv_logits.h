// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// From dot products to logits.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_LOGITS_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_LOGITS_H_

#include <cstdint>

#include "elements.h"
#include "split_kv_tiles.h"

namespace jax_attn::gpu {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// The logit in base 2 of key `i` of a tile for a row; -inf if the row does not see it.
template <bool kExtras>
JAX_ATTN_DEVICE float Logit(const SplitKvAttentionParams& p, const Segment& s, const Tile& tile,
                            int i, int row, float dot) {
  const RowInfo& info = s.rows[row];
  const int key = tile.first_key + i;
  if (key < info.keys.begin || key >= info.keys.end) return -kInfinity;
  float x = dot * s.logit_factor;
  if constexpr (kExtras) {
    if (p.mask.data != nullptr && static_cast<const uint8_t*>(p.mask.data)[info.mask + key] == 0) {
      return -kInfinity;
    }
    if (s.k_scale != nullptr) x *= tile.k_scale[i];
    if (p.logits_soft_cap != 0) x = p.logits_soft_cap * tanhf(x / p.logits_soft_cap);
    if (p.bias.data != nullptr) x += LoadElement(p.bias.data, p.bias.dtype, info.bias + key);
    if (p.alibi_slopes.data != nullptr) {
      x -= info.slope * fabsf(static_cast<float>(info.position - key));
    }
  }
  return x * kLog2E;
}

// Running state of a row: `top` is the largest logit in base 2, `total` the sum of 2^(x - top).
// 0 stands in for a maximum of -inf, since -inf - -inf would be NaN.
JAX_ATTN_DEVICE float Base(float top) { return top == -kInfinity ? 0.0f : top; }

// Says for each row which keys it sees and where its bias and mask are.
JAX_ATTN_DEVICE void DescribeRow(const SplitKvAttentionParams& p, const BatchOffsets& at,
                                 const Entry& entry, int kv_head, int row, RowInfo& info) {
  info = RowInfo{};
  if (row >= entry.num_rows) return;  // sees no key
  const int group = GroupSize(p), query = QueryOfRow(p, entry.first_row + row);
  const int head = kv_head * group + entry.first_row + row - query * group;
  info.keys = VisibleKeys(p, entry.context, query);
  info.position = entry.context.first_query + query;
  if (p.alibi_slopes.data != nullptr) info.slope = p.alibi_slopes.data[at.alibi_slopes + head];
  info.bias = at.bias + head * p.bias.head_stride + query * p.bias.query_stride;
  info.mask = at.mask + head * p.mask.head_stride + query * p.mask.query_stride;
}

// Where a query row is read from, and an output row written to; in rows.
template <typename Params>
JAX_ATTN_DEVICE int64_t RowIndex(const Params& p, int kv_head, int row) {
  const int group = GroupSize(p), query = QueryOfRow(p, row);
  return static_cast<int64_t>(query) * p.num_q_heads + kv_head * group + row - query * group;
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_LOGITS_H_
