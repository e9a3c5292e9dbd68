// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_attention.h"

#include <atomic>
#include <vector>

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

// Counts the splits of each entry and head that are done.
class FinishedSplits {
 public:
  FinishedSplits(int64_t num_merges, int64_t num_heads)
      : num_heads_(num_heads), counts_(num_merges * num_heads) {}

  // Whether this was the last; then the results of all are there to see.
  bool Add(const SplitEntry& entry, int64_t head) {
    return counts_[entry.merge * num_heads_ + head].fetch_add(1) + 1 == entry.num_splits;
  }

 private:
  int64_t num_heads_;
  std::vector<std::atomic<int64_t>> counts_;
};

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
  FinishedSplits finished(plan.num_merges, p.num_kv_heads);
  float* const partials = p.workspace + layout.num_threads * layout.scratch_size;
  const int64_t num_items = plan.items.size();
  ParallelFor(executor, plan.num_threads, num_items, [&](int64_t i, int64_t worker) {
    const PlannedItem& planned = plan.items[i];
    const SplitEntry& entry = plan.entries[planned.entry];
    SplitItem item;
    item.batch_index = entry.batch_index;
    item.rows = entry.rows;
    item.head_begin = planned.head_begin;
    item.head_end = planned.head_end;
    item.keys = entry.Split(planned.split);
    item.scratch = p.workspace + worker * layout.scratch_size;
    if (entry.num_splits > 1) {
      item.partial = partials + (entry.first_partial + planned.split) * layout.partial_size;
    }
    kernels->split(p, item);
    if (entry.num_splits == 1) return;
    // Whoever does the last split of a head merges it: nobody waits, and the order of what is
    // added up does not depend on who.
    for (int64_t head = item.head_begin; head < item.head_end; ++head) {
      if (!finished.Add(entry, head)) continue;
      MergeItem merge;
      merge.batch_index = entry.batch_index;
      merge.rows = entry.rows;
      merge.head = head;
      merge.partials = partials + entry.first_partial * layout.partial_size;
      merge.partial_stride = layout.partial_size;
      merge.num_splits = entry.num_splits;
      kernels->merge(p, merge);
    }
  });
  return "";
}

}  // namespace jax_attn::cpu
