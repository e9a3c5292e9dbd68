// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The two stages of split-KV attention on one CPU thread, compiled once per instruction set.

#ifndef JAX_ATTN_CSRC_CPU_SPLIT_KV_KERNEL_H_
#define JAX_ATTN_CSRC_CPU_SPLIT_KV_KERNEL_H_

#include <cstdint>

#include "../split_kv_attention.h"

namespace jax_attn::cpu {

// Keys that are scored, normalised and accumulated together.
inline constexpr int64_t kTileKeys = 32;
// The same with matrix instructions.
inline constexpr int64_t kBlockKeys = 64;

// The largest head_dim in the capability table.
inline constexpr int64_t kMaxHeadDim = 512;

// Row vectors in scratch memory are padded to this many floats: two vectors of the widest set.
inline constexpr int64_t kRowPadding = 32;

constexpr int64_t Padded(int64_t n) { return (n + kRowPadding - 1) / kRowPadding * kRowPadding; }

// Row r of a kv head is query r / group_size with head r % group_size of the group, so that the
// queries of a block of rows are consecutive.
struct RowBlock {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end > begin ? end - begin : 0; }
};

// The keys that a sequence has, and the position of its first query among them, or outside.
struct Context {
  int64_t length = 0;
  int64_t first_query = 0;
};

inline Context ContextOf(const SplitKvAttentionParams& p, int64_t batch_index) {
  Context context;
  context.length = p.kv_len;
  if (p.kv_lengths.data != nullptr) {
    const int64_t length = *p.kv_lengths.At(p.batch, batch_index);
    context.length = length < 0 ? 0 : length > p.kv_len ? p.kv_len : length;
  }
  if (p.query_offset.data != nullptr) {
    context.first_query = *p.query_offset.At(p.batch, batch_index);
  } else if (p.causal != Causal::kTopLeft) {
    context.first_query = context.length - p.query_len;
  }
  return context;
}

// Keys that a query may see by length, causality and window. The same for all heads.
inline KeyRange VisibleKeys(const SplitKvAttentionParams& p, const Context& context,
                            int64_t query) {
  const int64_t position = context.first_query + query;
  KeyRange keys{0, context.length};
  if (p.causal != Causal::kNone && position + 1 < keys.end) keys.end = position + 1;
  if (p.sliding_window != 0 && position - p.sliding_window + 1 > keys.begin) {
    keys.begin = position - p.sliding_window + 1;
  }
  return keys;
}

// What one thread does at a time: some rows of some kv heads against one split of the keys.
struct SplitItem {
  int64_t batch_index = 0;
  RowBlock rows;
  int64_t head_begin = 0;
  int64_t head_end = 0;
  KeyRange keys;
  float* scratch = nullptr;
  // Where to leave unnormalised results of this split, for [kv head][row in block]; null if the
  // item has all keys of its rows and writes the output itself.
  float* partial = nullptr;
};

// One head of one block of rows, whose keys were cut into `num_splits` partial results.
struct MergeItem {
  int64_t batch_index = 0;
  RowBlock rows;
  int64_t head = 0;
  const float* partials = nullptr;
  int64_t partial_stride = 0;  // floats between splits
  int64_t num_splits = 0;
};

// A partial result of a row: v_head_dim accumulated values, then maximum and sum.
constexpr int64_t PartialSize(int64_t v_head_dim) { return v_head_dim + 2; }

// Rows that scratch has room for queries of: matrix instructions take 16 as pairs of elements.
constexpr int64_t QueryRows(int64_t rows) { return rows < 8 ? 8 : rows; }

// Floats of scratch for an item of `rows` rows and `heads` heads: queries, outputs, maxima and, for
// each lane of the widest set, sums; and the logits of one head.
constexpr int64_t ScratchSize(int64_t rows, int64_t heads, int64_t head_dim, int64_t v_head_dim) {
  return heads * QueryRows(rows) * Padded(head_dim) + heads * rows * (Padded(v_head_dim) + 1 + 16) +
         rows * kBlockKeys;
}

struct SplitKvKernels {
  const char* name;
  void (*split)(const SplitKvAttentionParams&, const SplitItem&);
  void (*merge)(const SplitKvAttentionParams&, const MergeItem&);
};

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_SPLIT_KV_KERNEL_H_
