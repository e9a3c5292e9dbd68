// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_attention.h"

#include <algorithm>

#include "instruction_sets.h"
#include "split_plan.h"

namespace jax_attn::cpu {

#define JAX_ATTN_DECLARE(set)                  \
  namespace set {                              \
  extern const SplitKvKernels kSplitKvKernels; \
  }
JAX_ATTN_FOR_EACH_SET(JAX_ATTN_DECLARE)
#undef JAX_ATTN_DECLARE
#if defined(JAX_ATTN_TILE_SET)
namespace JAX_ATTN_TILE_SET {
extern const SplitKvKernels kSplitKvTileKernels;
}
#endif

namespace {

// Multiply-adds below which handing work to another thread costs more than it saves (about 10 us).
constexpr int64_t kMinParallelWork = 256 * 1024;

// The entry that a numbered item belongs to.
const SplitEntry& EntryOf(const SplitPlan& plan, int64_t item) {
  auto next = std::upper_bound(
      plan.entries.begin(), plan.entries.end(), item,
      [](int64_t item, const SplitEntry& entry) { return item < entry.first_item; });
  return *(next - 1);
}

}  // namespace

std::vector<const SplitKvKernels*> AvailableSplitKvKernels() {
  std::vector<const SplitKvKernels*> kernels;
#if defined(JAX_ATTN_TILE_SET)
  if (MayUseTiles()) kernels.push_back(&JAX_ATTN_TILE_SET::kSplitKvTileKernels);
#endif
#define JAX_ATTN_ADD(set) \
  if (CanRun(#set)) kernels.push_back(&set::kSplitKvKernels);
  JAX_ATTN_FOR_EACH_SET(JAX_ATTN_ADD)
#undef JAX_ATTN_ADD
  return kernels;
}

std::string LaunchSplitKvAttention(const SplitKvAttentionParams& p, std::string_view variant,
                                   Executor& executor) {
  static const std::vector<const SplitKvKernels*> available = AvailableSplitKvKernels();
  const SplitKvKernels* kernels = variant.empty() ? available.front() : nullptr;
  for (const SplitKvKernels* candidate : available) {
    if (variant == candidate->name) kernels = candidate;
  }
  if (kernels == nullptr) return "variant '" + std::string(variant) + "' cannot run here";

  // The workspace was sized where the call was compiled, perhaps for other threads than these.
  int64_t num_threads = executor.num_threads();
  SplitLayout layout = MakeSplitLayout(p, num_threads);
  while (layout.workspace_size() > p.workspace_size && num_threads > 1) {
    layout = MakeSplitLayout(p, --num_threads);
  }
  if (layout.workspace_size() > p.workspace_size) {
    return "workspace has " + std::to_string(p.workspace_size) + " floats, expected at least " +
           std::to_string(layout.workspace_size());
  }
  if (layout.num_row_blocks == 0) return "";

  const SplitPlan plan = PlanSplits(p, layout);
  if (plan.work < kMinParallelWork) num_threads = 1;
  float* const partials = p.workspace + layout.num_threads * layout.scratch_size;
  ParallelFor(executor, num_threads, plan.num_items, [&](int64_t i, int64_t worker) {
    const SplitEntry& entry = EntryOf(plan, i);
    const int64_t split = (i - entry.first_item) / layout.num_head_groups;
    const int64_t head_group = (i - entry.first_item) % layout.num_head_groups;
    SplitItem item;
    item.batch_index = entry.batch_index;
    item.rows = entry.rows;
    item.head_begin = head_group * layout.heads_per_item;
    item.head_end = std::min(p.num_kv_heads, item.head_begin + layout.heads_per_item);
    item.keys = entry.Split(split);
    item.scratch = p.workspace + worker * layout.scratch_size;
    if (entry.num_splits > 1) {
      item.partial = partials + (entry.first_partial + split) * layout.partial_size;
    }
    kernels->split(p, item);
  });
  if (plan.num_merges == 0) return "";

  std::vector<const SplitEntry*> merges;
  merges.reserve(plan.num_merges);
  for (const SplitEntry& entry : plan.entries) {
    if (entry.num_splits > 1) merges.push_back(&entry);
  }
  ParallelFor(executor, plan.merge_work < kMinParallelWork ? 1 : num_threads,
              plan.num_merges * p.num_kv_heads, [&](int64_t i, int64_t) {
                const SplitEntry& entry = *merges[i / p.num_kv_heads];
                MergeItem item;
                item.batch_index = entry.batch_index;
                item.rows = entry.rows;
                item.head = i % p.num_kv_heads;
                item.partials = partials + entry.first_partial * layout.partial_size;
                item.partial_stride = layout.partial_size;
                item.num_splits = entry.num_splits;
                kernels->merge(p, item);
              });
  return "";
}

}  // namespace jax_attn::cpu
