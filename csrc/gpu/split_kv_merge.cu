// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The merge kernels. A wave merges a piece of one row of an entry whose keys were cut. Few blocks
// without shared memory take all pieces, so that they fit beside those of a stream kernel and are
// there before it ends.

#include "split_kv_finish.h"
#include "split_kv_kernels.h"
#include "split_kv_work.h"

namespace jax_attn::gpu {
namespace {

// Slots of the parts of an entry.
struct Slots {
  int count = 0;
  int first = 0;   // slot of the first part
  int second = 0;  // of the second
  int step = 0;    // to each after it

  JAX_ATTN_DEVICE int At(int i) const { return i == 0 ? first : second + (i - 1) * step; }
};

// The parts of the entry that begins in the share of a group and goes on in the next ones.
JAX_ATTN_DEVICE Slots SlotsOfShare(int group, const ShareEnd& end) {
  Slots slots;
  const int64_t begin = int64_t{group} * end.share;
  if (end.begin < begin || end.end <= begin + end.share) return slots;
  slots.count = (end.end - 1) / end.share - group + 1;
  slots.first = 2 * group + (end.begin == begin ? 0 : 1);
  slots.second = 2 * (group + 1);
  slots.step = 2;
  return slots;
}

// Those of the entry that `index` stands for: see SplitWork::num_merges.
template <typename Params>
JAX_ATTN_DEVICE Slots FindSlots(const Params& p, const SplitWork& w, int index, int& entry) {
  entry = index;
  if (w.cut != Cut::kShares) {
    Slots slots;
    slots.count = FixedSplits(w, Entry(p, w, index).keys).count();
    slots.first = index * w.max_splits;
    slots.second = slots.first + 1;
    slots.step = 1;
    return slots;
  }
  ShareEnd end;
  int group = index;
  if (!w.uniform) {
    end = w.ends[group];
    entry = end.entry;
  } else {
    const int units = w.units.divisor();
    if (w.merges_entries()) {
      group = index * units / w.share;
    } else {
      entry = w.units.Divide(min((group + 1) * w.share, units * w.num_entries) - 1);
    }
    end = {entry, entry * units, (entry + 1) * units, w.share};
  }
  return SlotsOfShare(group, end);
}

JAX_ATTN_DEVICE int64_t SinksOffset(const SplitKvAttentionParams& p, int64_t batch_index) {
  return p.sinks.batch.Offset(p.batch, batch_index);
}
JAX_ATTN_DEVICE int64_t SinksOffset(const StreamParams&, int64_t) { return 0; }

template <typename Params>
__global__ void JAX_ATTN_LAUNCH_BOUNDS(kMergeThreads, kMergeBlocksPerCore)
    MergeKernel(JAX_ATTN_PARAMETER Params p, JAX_ATTN_PARAMETER SplitWork w) {
  AllowNextKernel();
  const int v_head_dim = static_cast<int>(p.v_head_dim);
  const int num_waves = gridDim.x * (kMergeThreads / kWave);
  const int first = blockIdx.x * (kMergeThreads / kWave) + WaveIndex();
  // Lanes that have the same four values take parts in turn, in an order that is fixed.
  const int lane_column = Lane() % kMergeColumns, lane_part = Lane() / kMergeColumns;
  // Before the split kernel has ended, all is done once for nothing: by then keys have thrown the
  // instructions and parameters of this kernel out of the caches, and each would be a wait.
  for (bool rehearsal = kOverlapsKernels;; rehearsal = false) {
    if (!rehearsal) WaitForPreviousKernel();
    for (int64_t base = first; base < w.num_pieces; base += int64_t{kWave} * num_waves) {
      // Each lane looks whether there is something to merge for one piece.
      const int64_t piece = base + int64_t{Lane()} * num_waves;
      Slots slots;
      int entry_index = 0;
      if (!rehearsal && piece < w.num_pieces) {
        const int row = w.pieces.Divide(static_cast<int>(piece));
        slots = FindSlots(p, w, w.kv_heads.Divide(w.rows.Divide(row)), entry_index);
      }
      uint64_t cut = rehearsal ? 1 : Ballot(slots.count > 1);
      for (; cut != 0; cut &= cut - 1) {
        const int lane = __ffsll(static_cast<unsigned long long>(cut)) - 1;
        const int this_piece = static_cast<int>(base + int64_t{lane} * num_waves);
        const int row_of_all = w.pieces.Divide(this_piece);
        const int row = w.rows.Remainder(row_of_all);
        const int kv_head = w.kv_heads.Remainder(w.rows.Divide(row_of_all));
        const int column = w.pieces.Remainder(this_piece) * kMergeColumns + lane_column;
        const Slots parts{Broadcast(slots.count, lane), Broadcast(slots.first, lane),
                          Broadcast(slots.second, lane), Broadcast(slots.step, lane)};
        const EntryRows entry(p, w, Broadcast(entry_index, lane));
        const bool exists = row < entry.num_rows && column < v_head_dim / 4;
        RowState state;
        const int count = exists ? parts.count : 0;
#pragma unroll 4
        for (int i = lane_part; i < count; i += kWave / kMergeColumns) {
          state.AddPartial(Partial(p, w, parts.At(i), kv_head), w, v_head_dim, row, column);
        }
#pragma unroll
        for (int other = kMergeColumns; other < kWave; other *= 2) state.AddLane(other);
        if (!exists || lane_part != 0) continue;
        FinishRow(p, entry.batch_index, kv_head, entry.first_row + row, column * 4, state.sum,
                  state.top, state.total, SinksOffset(p, entry.batch_index), !rehearsal);
      }
      if (rehearsal) break;
    }
    if (!rehearsal) return;
  }
}

}  // namespace

const void* MergeKernelOf() { return KernelAddress(MergeKernel<SplitKvAttentionParams>); }
const void* StreamMergeKernelOf() { return KernelAddress(MergeKernel<StreamParams>); }

}  // namespace jax_attn::gpu
