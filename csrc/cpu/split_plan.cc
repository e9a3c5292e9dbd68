// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_plan.h"

#include <algorithm>

namespace jax_attn::cpu {
namespace {

// Rows that share one pass over the keys. More would not fit the caches with their tile.
constexpr int64_t kMaxRowsPerBlock = 32;

// Queries, accumulators and logits of an item: half of a typical 512 KiB second-level cache.
constexpr int64_t kScratchFloats = 64 * 1024;

// Planned splits are so many times the threads, for balance when lengths differ or a thread is
// late, and not below so many keys, so that merging stays a small part. Where there are as many
// contexts anyway, fewer do, since only a context much longer than others has to be split.
constexpr int64_t kItemsPerThread = 8;
constexpr int64_t kItemsPerThreadOfMany = 2;
constexpr int64_t kMinPlannedSplit = 256;

// Multiply-adds below which handing work to another thread costs more than it saves (about 10 us).
constexpr int64_t kMinParallelWork = 256 * 1024;

// The same below which heads of a split are not given to several threads.
constexpr int64_t kMinItemWork = 4 * kMinParallelWork;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Shrinks `keys` to what a mask row that all heads and queries share lets through. A mask is often
// the only thing that says how long the contexts are.
KeyRange TrimByMask(const SplitKvAttentionParams& p, int64_t batch_index, KeyRange keys) {
  if (p.mask.data == nullptr || p.mask.head_stride != 0 || p.mask.query_stride != 0) return keys;
  const uint8_t* mask =
      static_cast<const uint8_t*>(p.mask.data) + p.mask.batch.Offset(p.batch, batch_index);
  while (keys.begin < keys.end && mask[keys.begin] == 0) ++keys.begin;
  while (keys.begin < keys.end && mask[keys.end - 1] == 0) --keys.end;
  return keys;
}

// Cuts the splits into items. Heads of a split stay together, since parts of rows are read more
// slowly, until less than a split is left for each thread: the last are shared out by heads, ever
// finer, so that threads end together.
void PlanItems(const SplitKvAttentionParams& p, const SplitLayout& layout, int64_t total_keys,
               SplitPlan& plan) {
  const int64_t work_per_key = layout.rows_per_block * (p.head_dim + p.v_head_dim);  // of a head
  int64_t left = total_keys * p.num_kv_heads * work_per_key;
  if (left >= kMinParallelWork) plan.num_threads = layout.num_threads;
  for (size_t entry = 0; entry < plan.entries.size(); ++entry) {
    for (int64_t split = 0; split < plan.entries[entry].num_splits; ++split) {
      const int64_t work = plan.entries[entry].Split(split).size() * work_per_key;
      for (int64_t head = 0; head < p.num_kv_heads;) {
        int64_t end = std::min(p.num_kv_heads, head + layout.heads_per_item);
        if (plan.num_threads > 1) {
          const int64_t share = left / plan.num_threads;
          const int64_t heads = std::max(share, kMinItemWork) / std::max<int64_t>(work, 1);
          const int64_t parts = CeilDiv(end - head, std::max<int64_t>(heads, 1));
          end = head + CeilDiv(end - head, parts);
        }
        plan.items.push_back({static_cast<int64_t>(entry), split, head, end});
        left -= work * (end - head);
        head = end;
      }
    }
  }
}

KeyRange KeysOfRows(const SplitKvAttentionParams& p, int64_t batch_index, RowBlock rows) {
  const Context context = ContextOf(p, batch_index);
  // Both ends of what a query sees move forward with the query.
  const KeyRange first = VisibleKeys(p, context, rows.begin / p.group_size());
  const KeyRange last = VisibleKeys(p, context, (rows.end - 1) / p.group_size());
  return TrimByMask(p, batch_index, {first.begin, last.end});
}

}  // namespace

SplitLayout MakeSplitLayout(const SplitKvAttentionParams& p, int64_t num_threads) {
  SplitLayout layout;
  const int64_t rows = p.query_len * p.group_size();
  if (p.batch.count == 0 || rows == 0 || p.num_kv_heads == 0) return layout;
  layout.num_threads = num_threads;
  layout.num_row_blocks = CeilDiv(rows, kMaxRowsPerBlock);
  layout.rows_per_block = CeilDiv(rows, layout.num_row_blocks);
  layout.num_row_blocks = CeilDiv(rows, layout.rows_per_block);

  // Heads of a token that lie side by side are read together, as one stream of memory.
  const bool heads_are_adjacent = p.key.head_stride < p.key.token_stride;
  const int64_t head_floats = ScratchSize(layout.rows_per_block, 1, p.head_dim, p.v_head_dim);
  layout.heads_per_item =
      heads_are_adjacent ? std::clamp<int64_t>(kScratchFloats / head_floats, 1, p.num_kv_heads) : 1;
  layout.num_head_groups = CeilDiv(p.num_kv_heads, layout.heads_per_item);
  layout.scratch_size = RoundUp(
      ScratchSize(layout.rows_per_block, layout.heads_per_item, p.head_dim, p.v_head_dim), 16);
  layout.partial_size = p.num_kv_heads * layout.rows_per_block * PartialSize(p.v_head_dim);

  const int64_t entries = p.batch.count * layout.num_row_blocks;
  if (p.num_splits != 0) {
    const int64_t splits = std::min(p.num_splits, CeilDiv(p.kv_len, kTileKeys) + 1);
    layout.max_partials = splits > 1 ? entries * splits : 0;
  } else if (p.split_size != 0) {
    const int64_t splits = CeilDiv(p.kv_len, p.split_size);
    layout.max_partials = splits > 1 ? entries * splits : 0;
  } else if (p.kv_len > kMinPlannedSplit && num_threads > 1) {
    // A planned split has at least its share of all keys, so contexts of more than one split
    // have at most twice as many splits as there are shares.
    const bool many = entries >= kItemsPerThreadOfMany * num_threads;
    layout.num_shares = CeilDiv((many ? kItemsPerThreadOfMany : kItemsPerThread) * num_threads,
                                layout.num_head_groups);
    layout.max_partials =
        std::min(2 * layout.num_shares, entries * CeilDiv(p.kv_len, kMinPlannedSplit));
  }
  return layout;
}

SplitPlan PlanSplits(const SplitKvAttentionParams& p, const SplitLayout& layout) {
  SplitPlan plan;
  const int64_t rows = p.query_len * p.group_size();
  int64_t total_keys = 0;
  plan.entries.reserve(p.batch.count * layout.num_row_blocks);
  for (int64_t b = 0; b < p.batch.count; ++b) {
    for (int64_t block = 0; block < layout.num_row_blocks; ++block) {
      SplitEntry entry;
      entry.batch_index = b;
      entry.rows.begin = block * layout.rows_per_block;
      entry.rows.end = std::min(rows, entry.rows.begin + layout.rows_per_block);
      entry.keys = KeysOfRows(p, b, entry.rows);
      total_keys += entry.keys.size();
      plan.entries.push_back(entry);
    }
  }
  const int64_t planned =
      layout.num_shares == 0
          ? p.kv_len + kTileKeys
          : std::max(kMinPlannedSplit, RoundUp(CeilDiv(total_keys, layout.num_shares), kTileKeys));
  int64_t num_partials = 0;
  for (SplitEntry& entry : plan.entries) {
    KeyRange& keys = entry.keys;
    if (p.split_size != 0) {
      // Cuts at multiples of the size, wherever the visible keys begin.
      entry.split_size = p.split_size;
      entry.first_split_end = (keys.begin / p.split_size + 1) * p.split_size;
    } else {
      entry.split_size =
          p.num_splits == 0 ? planned : RoundUp(CeilDiv(keys.size(), p.num_splits), kTileKeys);
      entry.first_split_end = keys.begin + entry.split_size;
    }
    entry.num_splits = keys.end <= entry.first_split_end
                           ? 1
                           : 1 + CeilDiv(keys.end - entry.first_split_end, entry.split_size);
    if (entry.num_splits > 1) {
      entry.first_partial = num_partials;
      entry.merge = plan.num_merges++;
      num_partials += entry.num_splits;
    }
  }
  PlanItems(p, layout, total_keys, plan);
  return plan;
}

}  // namespace jax_attn::cpu
