// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Shares of GPU plans as a Hopper device would have them, without a GPU.

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/gpu/split_plan.h"

namespace {

using namespace jax_attn;       // NOLINT
using namespace jax_attn::gpu;  // NOLINT

void Expect(bool condition, const char* what, int64_t x, int64_t y) {
  if (condition) return;
  std::printf("%s: %lld, %lld\n", what, static_cast<long long>(x), static_cast<long long>(y));
  std::exit(1);
}

// Groups have all units, one after the other, and late ones are much shorter.
void CheckShares(const SplitWork& w, int total) {
  const Shares shares = w.SharesOf(total);
  Expect(shares.Begin(0) == 0, "the first unit", shares.Begin(0), total);
  Expect(shares.Begin(w.num_groups) >= static_cast<uint32_t>(total), "units of all groups",
         shares.Begin(w.num_groups), total);
  for (int unit = 0; unit < total; ++unit) {
    const int group = shares.GroupOf(unit);
    Expect(group < w.num_groups && shares.Begin(group) <= static_cast<uint32_t>(unit) &&
               static_cast<uint32_t>(unit) < shares.Begin(group + 1),
           "the group of a unit", group, unit);
  }
  if (total > 64 * w.num_groups) {
    Expect(4 * shares.late_size <= shares.size, "a late share", shares.late_size, shares.size);
  }
}

SplitPlan PlanOf(int64_t batch, int64_t kv_heads, int64_t kv_len, bool lengths, bool tensor_maps,
                 int64_t workspace_limit, int64_t sliding_window = 0) {
  static const int32_t some = 0;
  SplitKvAttentionParams p;
  p.batch.num_dims = 1;
  p.batch.sizes[0] = p.batch.count = batch;
  p.query_len = 1;
  p.num_q_heads = p.num_kv_heads = kv_heads;
  p.head_dim = p.v_head_dim = 128;
  p.kv_len = kv_len;
  p.sliding_window = sliding_window;
  p.query_dtype = p.key.dtype = p.value.dtype = DType::kBFloat16;
  p.key.batch.strides[0] = p.value.batch.strides[0] = kv_len * kv_heads * 128;
  if (lengths) p.kv_lengths.data = &some;
  Device device;
  device.tensor_maps = tensor_maps;
  return PlanSplits(p, "", device, workspace_limit);
}

struct Case {
  int64_t batch, kv_heads, kv_len;
  int first, late;  // groups
};

// Blocks of a cluster, with lengths and without; 0: there are none.
struct SmallCase {
  int64_t batch, kv_heads, kv_len, window;
  int size, uniform_size;
};

void CheckClusters(const SmallCase& c) {
  constexpr int64_t kNoLimit = int64_t{1} << 40;
  for (const bool lengths : {false, true}) {
    const SplitPlan plan = PlanOf(c.batch, c.kv_heads, c.kv_len, lengths, true, kNoLimit, c.window);
    const SplitWork& w = plan.work;
    const int size = lengths ? c.size : c.uniform_size;
    Expect(plan.shape.clusters == (size != 0), "a cluster kernel", c.batch, c.kv_len);
    if (size == 0) continue;
    Expect(plan.variant() == "stream", "a stream kernel", c.kv_heads, c.kv_len);
    Expect(w.cluster == size && plan.num_splits == size, "blocks of a cluster", w.cluster, size);
    Expect(w.num_groups == c.batch * size, "groups", w.num_groups, size);
    Expect(!plan.merges && plan.workspace_size == 0, "no merge kernel", plan.merges,
           plan.workspace_size);
    const SplitPlan other =
        PlanOf(c.batch, c.kv_heads, c.kv_len, lengths, false, kNoLimit, c.window);
    Expect(!other.shape.clusters && other.work.cluster == 1, "no clusters without tensor maps",
           other.work.cluster, c.kv_len);
  }
}

}  // namespace

int main() {
  constexpr Case kCases[] = {{1, 32, 32768, 4, 8},  {2, 32, 16384, 4, 8}, {3, 32, 10880, 4, 8},
                             {1, 16, 65536, 8, 8},  {1, 64, 16384, 2, 4}, {1, 8, 131072, 16, 0},
                             {1, 12, 65536, 11, 0}, {1, 32, 4096, 4, 0},  {1, 1, 1048576, 128, 0}};
  constexpr int64_t kNoLimit = int64_t{1} << 40;
  for (const Case& c : kCases) {
    for (const bool lengths : {false, true}) {
      const SplitPlan plan = PlanOf(c.batch, c.kv_heads, c.kv_len, lengths, true, kNoLimit);
      const SplitWork& w = plan.work;
      Expect(plan.variant() == "stream", "a stream kernel", c.kv_heads, c.kv_len);
      Expect(w.shares.num_first == c.first, "groups before late ones", w.shares.num_first, c.first);
      Expect(w.num_groups - c.first == c.late, "late groups", w.num_groups - c.first, c.late);
      Expect(plan.merges && w.cluster == 1, "a merge kernel", plan.merges, w.cluster);
      Expect(plan.num_splits <= w.num_groups, "splits", plan.num_splits, w.num_groups);
      if (c.batch == 1) Expect(plan.num_splits == w.num_groups, "splits", plan.num_splits, c.late);
      // With lengths the device cuts what there is.
      for (int total = 1; total < 4000; total += total < 300 ? 1 : 37) CheckShares(w, total);
      // With less workspace than late groups need there are none.
      const SplitPlan small =
          PlanOf(c.batch, c.kv_heads, c.kv_len, lengths, true, plan.workspace_size - 1);
      Expect(small.workspace_size < plan.workspace_size, "workspace", small.workspace_size,
             plan.workspace_size);
      const int num_groups = small.work.num_groups;
      Expect(c.late == 0 ? num_groups < c.first : num_groups == c.first, "groups", num_groups,
             c.first);
      CheckShares(small.work, 1000);
      const SplitPlan other = PlanOf(c.batch, c.kv_heads, c.kv_len, lengths, false, kNoLimit);
      Expect(other.work.num_groups == other.work.first_groups.divisor(), "groups of other kernels",
             other.work.num_groups, other.work.first_groups.divisor());
    }
  }
  constexpr SmallCase kSmallCases[] = {
      // A block for every second core, or two blocks where that is none.
      {4, 8, 512, 0, 2, 2},
      {2, 8, 1024, 0, 4, 4},
      {1, 8, 2048, 0, 8, 8},
      {8, 8, 512, 0, 2, 0},
      {9, 8, 512, 0, 0, 0},
      // Four tiles for a wave at most, half a tile at least.
      {1, 8, 4096, 0, 8, 8},
      {1, 8, 4097, 0, 0, 0},
      {8, 8, 1024, 0, 2, 0},
      {8, 8, 1025, 0, 0, 0},
      {1, 8, 256, 0, 4, 4},
      {4, 8, 65, 0, 2, 2},
      {4, 8, 64, 0, 0, 0},
      // What a window leaves of a long context.
      {4, 8, 131072, 300, 2, 2},
      {4, 8, 131072, 2000, 0, 0},
  };
  for (const SmallCase& c : kSmallCases) CheckClusters(c);
  std::printf("plans: %d\n", static_cast<int>(sizeof(kCases) / sizeof(*kCases)));
  return 0;
}
