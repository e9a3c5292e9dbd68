// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// How a problem is cut into items of work for threads.

#ifndef JAX_ATTN_CSRC_CPU_SPLIT_PLAN_H_
#define JAX_ATTN_CSRC_CPU_SPLIT_PLAN_H_

#include <cstdint>
#include <vector>

#include "split_kv_kernel.h"

namespace jax_attn::cpu {

// What follows from shapes and options alone. It decides the size of the workspace, which is an
// output buffer of the XLA call and so must be known before lengths are.
struct SplitLayout {
  int64_t num_threads = 1;
  int64_t rows_per_block = 0;
  int64_t num_row_blocks = 0;
  int64_t heads_per_item = 0;
  int64_t num_head_groups = 0;
  int64_t num_shares = 0;    // equal parts that all keys are planned in; 0: not planned
  int64_t max_partials = 0;  // splits, of all contexts together, whose results are merged
  int64_t partial_size = 0;  // floats of one of them, all kv heads of a row block
  int64_t scratch_size = 0;  // floats of a thread

  int64_t workspace_size() const {
    return num_threads * scratch_size + max_partials * partial_size;
  }
};

SplitLayout MakeSplitLayout(const SplitKvAttentionParams& p, int64_t num_threads);

// The splits of one row block of one batch index, all heads.
struct SplitEntry {
  int64_t batch_index = 0;
  RowBlock rows;
  KeyRange keys;           // that some row sees
  int64_t split_size = 0;  // keys in a split; the first may be shorter
  int64_t first_split_end = 0;
  int64_t num_splits = 0;
  int64_t first_partial = 0;  // if num_splits > 1
  int64_t merge = 0;          // its number among such entries

  KeyRange Split(int64_t i) const {
    KeyRange split;
    split.begin = i == 0 ? keys.begin : first_split_end + (i - 1) * split_size;
    split.end = first_split_end + i * split_size;
    if (split.end > keys.end) split.end = keys.end;
    return split;
  }
};

// Some heads of a split: what a thread takes at a time.
struct PlannedItem {
  int64_t entry = 0;
  int64_t split = 0;
  int64_t head_begin = 0;
  int64_t head_end = 0;
};

struct SplitPlan {
  std::vector<SplitEntry> entries;
  std::vector<PlannedItem> items;  // in the order in which they are to be begun
  int64_t num_threads = 1;         // worth using
  int64_t num_merges = 0;          // entries with more than one split
};

// Plans with the lengths at hand. Deterministic in its arguments, so results repeat bit for bit.
SplitPlan PlanSplits(const SplitKvAttentionParams& p, const SplitLayout& layout);

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_SPLIT_PLAN_H_
