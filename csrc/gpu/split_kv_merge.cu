// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The merge kernels: blocks for each kv head and a few rows of an entry whose keys may have been
// cut.

#include "split_kv_finish.h"
#include "split_kv_kernels.h"
#include "split_kv_work.h"

namespace jax_attn::gpu {
namespace {

struct Slots {
  int count = 0;
  int first = 0;   // slot of the first part
  int second = 0;  // of the second
  int step = 0;    // to each after it

  JAX_ATTN_DEVICE int64_t At(int i) const { return i == 0 ? first : second + (i - 1) * step; }
};

// The parts of an entry, by the units before it and its own.
JAX_ATTN_DEVICE Slots SlotsOfUnits(const Shares& shares, int begin, int units) {
  Slots slots;
  const int group = shares.GroupOf(begin);
  slots.count = shares.GroupOf(begin + units - 1) - group + 1;
  slots.first = 2 * group + (static_cast<uint32_t>(begin) == shares.Begin(group) ? 0 : 1);
  slots.second = 2 * (group + 1);
  slots.step = 2;
  return slots;
}

// The parts of entry `index`; every lane of the wave calls it.
template <typename Params>
JAX_ATTN_DEVICE Slots SlotsOfEntryInShares(const Params& p, const SplitWork& w, int index) {
  if (w.uniform) return SlotsOfUnits(w.shares, index * w.units.divisor(), w.units.divisor());
  int before = 0, total = 0;
  for (int i = Lane(); i < w.num_entries; i += kWave) {
    const int units = UnitsOfEntry(p, w, i);
    total += units;
    before += i < index ? units : 0;
  }
  return SlotsOfUnits(w.SharesOf(SumOfLanes(total)), SumOfLanes(before), UnitsOfEntry(p, w, index));
}

// The parts of the entry that begins in the share of a group and goes on in the next ones; every
// lane of the wave calls it.
template <typename Params>
JAX_ATTN_DEVICE Slots SlotsOfShare(const Params& p, const SplitWork& w, int group, int& entry) {
  const Place next = FindShare(p, w, group + 1);
  const int begin = next.start - next.offset;
  if (next.units <= 0 || next.offset == 0 ||
      static_cast<uint32_t>(begin) < next.shares.Begin(group)) {
    return {};
  }
  entry = next.entry;
  return SlotsOfUnits(next.shares, begin, UnitsOfEntry(p, w, entry));
}

template <typename Params>
JAX_ATTN_DEVICE Slots SlotsOfEntry(const Params& p, const SplitWork& w, int index) {
  Slots slots;
  slots.count = FixedSplits(w, Entry(p, w, index).keys).count();
  slots.first = index * w.max_splits;
  slots.second = slots.first + 1;
  slots.step = 1;
  return slots;
}

// The parts of what a block merges: entry `index`, or one that begins in the share of group
// `index`, which is written to `entry`.
template <typename Params>
JAX_ATTN_DEVICE Slots FindSlots(const Params& p, const SplitWork& w, int index, int& entry) {
  if (w.cut != Cut::kShares) return SlotsOfEntry(p, w, index);
  if (w.merges_entries()) return SlotsOfEntryInShares(p, w, index);
  return SlotsOfShare(p, w, index, entry);
}

JAX_ATTN_DEVICE int64_t SinksOffset(const SplitKvAttentionParams& p, int64_t batch_index) {
  return p.sinks.batch.Offset(p.batch, batch_index);
}
JAX_ATTN_DEVICE int64_t SinksOffset(const StreamParams&, int64_t) { return 0; }

template <typename Params>
__global__ void __launch_bounds__(kMergeThreads)
    MergeKernel(JAX_ATTN_PARAMETER Params first_p, JAX_ATTN_PARAMETER SplitWork first_w) {
  __shared__ float tops[kMergeThreads];
  __shared__ float totals[kMergeThreads];
  __shared__ float4 sums[kMergeThreads];
  constexpr int kAtOnce = 4;
  // Lengths decide which parts there are, and were there before the split kernel began.
  const int index = first_w.kv_heads.Divide(first_w.merge_chunks.Divide(blockIdx.x));
  int entry_index = index;
  const Slots slots = FindSlots(first_p, first_w, index, entry_index);
  if (slots.count <= 1) {
    // What follows waits for this kernel alone, so that it must not end before the split kernel.
    if (blockIdx.x == 0) WaitForPreviousKernel();
    return;
  }
  const Params& p = FreshParameter(first_p);
  const SplitWork& w = FreshParameter<Params>(first_w);
  const int chunk = w.merge_chunks.Remainder(blockIdx.x);
  const int kv_head = w.kv_heads.Remainder(w.merge_chunks.Divide(blockIdx.x));
  const int v_head_dim = static_cast<int>(p.v_head_dim);
  // Threads that have the same four values take parts in turn, in an order that is fixed.
  const int columns = v_head_dim / 4;
  const int threads_per_part = min(columns * w.merge_rows, kMergeThreads);
  const int num_lanes = kMergeThreads / threads_per_part;
  const int lane = threadIdx.x / threads_per_part, value = threadIdx.x % threads_per_part;
  const int row = chunk * w.merge_rows + value / columns, column = value % columns;
  const EntryRows entry(p, w, entry_index);
  const bool exists = row < entry.num_rows;
  // Before the split kernel has ended, all is done once for nothing: by then keys have thrown the
  // instructions and parameters of this kernel out of the caches, and each would be a wait.
  for (bool rehearsal = kOverlapsKernels;; rehearsal = false) {
    if (!rehearsal) {
      WaitForPreviousKernel();
      if (w.allows_next) AllowNextKernel();
    }
    const int count = rehearsal || !exists || lane >= num_lanes ? 0 : slots.count;
    RowState state;
    for (int i = lane; i < count; i += kAtOnce * num_lanes) {
      RowState parts[kAtOnce];  // all are asked for before the first is waited for
      float top = state.top;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int at = i + j * num_lanes;
        if (at < count) {
          parts[j] = LoadPartial(Partial(p, w, slots.At(at), kv_head), w, v_head_dim, row, column);
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) top = Max(top, parts[j].top);
      state.Raise(top);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) state.AddBelow(parts[j].top, parts[j].total, parts[j].sum);
    }
    if (num_lanes > 1) {
      tops[threadIdx.x] = state.top;
      totals[threadIdx.x] = state.total;
      sums[threadIdx.x] = state.sum;
      __syncthreads();
      const int end = lane == 0 ? num_lanes * threads_per_part : 0;
      float top = state.top;
      for (int i = threads_per_part + value; i < end; i += threads_per_part) {
        top = Max(top, tops[i]);
      }
      state.Raise(top);
      for (int i = threads_per_part + value; i < end; i += threads_per_part) {
        state.AddBelow(tops[i], totals[i], sums[i]);
      }
    }
    if (lane == 0 && exists) {
      FinishRow(p, entry.batch_index, kv_head, entry.first_row + row, column * 4, state.sum,
                state.top, state.total, SinksOffset(p, entry.batch_index), !rehearsal);
    }
    if (!rehearsal) return;
    __syncthreads();
  }
}

}  // namespace

const void* MergeKernelOf() { return KernelAddress(MergeKernel<SplitKvAttentionParams>); }
const void* StreamMergeKernelOf() { return KernelAddress(MergeKernel<StreamParams>); }

}  // namespace jax_attn::gpu
