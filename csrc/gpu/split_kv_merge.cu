// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The merge kernels: one block for each row of an entry whose keys may have been cut.

#include "split_kv_finish.h"
#include "split_kv_kernels.h"
#include "split_kv_work.h"

namespace jax_attn::gpu {
namespace {

struct Slots {
  int count = 0;
  int64_t first = 0;   // slot of the first part
  int64_t second = 0;  // of the second
  int64_t step = 0;    // to each after it

  JAX_ATTN_DEVICE int64_t At(int i) const { return i == 0 ? first : second + (i - 1) * step; }
};

// The parts of the entry that begins in a share and goes on in the next ones: of share `index`, or
// of entry `index` (SplitWork::merges_entries).
JAX_ATTN_DEVICE Slots SlotsOfShare(const SplitWork& w, int index, int& entry) {
  int group = index;
  ShareEnd end;
  if (!w.uniform) {
    end = LoadFromL2(w.ends + group);
  } else {
    const int units = w.units.divisor();
    if (w.merges_entries()) {
      group = index * units / w.share;
      end.entry = index;
    } else {
      end.entry = w.units.Divide(min((group + 1) * w.share, units * w.num_entries) - 1);
    }
    end = {end.entry, end.entry * units, (end.entry + 1) * units, w.share};
  }
  Slots slots;
  const int64_t begin = int64_t{group} * end.share;
  if (end.begin < begin || end.end <= begin + end.share) return slots;
  entry = end.entry;
  slots.count = (end.end - 1) / end.share - group + 1;
  slots.first = int64_t{2} * group + (end.begin == begin ? 0 : 1);
  slots.second = int64_t{2} * (group + 1);
  slots.step = 2;
  return slots;
}

template <typename Params>
JAX_ATTN_DEVICE Slots SlotsOfEntry(const Params& p, const SplitWork& w, int index) {
  Slots slots;
  slots.count = FixedSplits(w, Entry(p, w, index).keys).count();
  slots.first = static_cast<int64_t>(index) * w.max_splits;
  slots.second = slots.first + 1;
  slots.step = 1;
  return slots;
}

JAX_ATTN_DEVICE int64_t SinksOffset(const SplitKvAttentionParams& p, int64_t batch_index) {
  return p.sinks.batch.Offset(p.batch, batch_index);
}
JAX_ATTN_DEVICE int64_t SinksOffset(const StreamParams&, int64_t) { return 0; }

template <typename Params>
__global__ void __launch_bounds__(kMergeThreads)
    MergeKernel(JAX_ATTN_PARAMETER Params p, JAX_ATTN_PARAMETER SplitWork w) {
  __shared__ float tops[kMergeThreads];
  __shared__ float totals[kMergeThreads];
  __shared__ float4 sums[kMergeThreads];
  const int row = w.rows.Remainder(blockIdx.x), rest = w.rows.Divide(blockIdx.x);
  const int kv_head = w.kv_heads.Remainder(rest);
  const int index = w.kv_heads.Divide(rest);  // of a group or an entry
  constexpr int kUnrolled = 4;
  const int v_head_dim = static_cast<int>(p.v_head_dim);
  // Threads that have the same four values take splits in turn, in an order that is fixed.
  const int columns = v_head_dim / 4;
  const int threads_per_split = columns < kMergeThreads ? columns : kMergeThreads;
  const int parts = kMergeThreads / threads_per_split;
  const int part = threadIdx.x / threads_per_split, column = threadIdx.x % threads_per_split;
  // Before the split kernel has ended, all is done once for nothing, with whatever the workspace
  // has: by then keys have thrown the instructions and parameters of this kernel out of the caches,
  // and each would be a wait.
  for (bool rehearsal = kOverlapsKernels;; rehearsal = false) {
    if (!rehearsal) {
      WaitForPreviousKernel();
      AllowNextKernel();
    }
    int entry_index = index;
    Slots slots =
        w.cut == Cut::kShares ? SlotsOfShare(w, index, entry_index) : SlotsOfEntry(p, w, index);
    if (rehearsal) {
      slots = {kUnrolled * parts};
      entry_index = 0;
    } else if (slots.count <= 1) {
      return;
    }
    const EntryRows entry(p, w, entry_index);
    if (row >= entry.num_rows) return;  // not in the rehearsal: the first entry has all rows
    RowState state;
    if (part < parts) {
#pragma unroll kUnrolled
      for (int i = part; i < slots.count; i += parts) {
        state.AddPartial<true>(Partial(p, w, slots.At(i), kv_head), w, v_head_dim, row, column);
      }
    }
    tops[threadIdx.x] = state.top;
    totals[threadIdx.x] = state.total;
    sums[threadIdx.x] = state.sum;
    __syncthreads();
    if (part == 0) {
      for (int i = 1; i < parts; ++i) {
        const int other = i * threads_per_split + column;
        state.Add(tops[other], totals[other], sums[other]);
      }
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
