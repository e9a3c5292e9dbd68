// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The merge kernel: one block for each row of an entry whose keys were cut.

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

JAX_ATTN_DEVICE Slots SlotsOf(const SplitKvAttentionParams& p, const SplitWork& w, int index) {
  Slots slots;
  if (w.cut != Cut::kShares) {
    const Entry entry(p, w, index);
    slots.count = FixedSplits(w, entry.keys).count;
    slots.first = static_cast<int64_t>(index) * w.max_splits;
    slots.second = slots.first + 1;
    slots.step = 1;
    return slots;
  }
  int start, end, total;
  if (w.uniform) {
    const int units = Entry(p, w, 0).units(w);
    start = index * units;
    end = start + units;
    total = units * w.num_entries;
  } else {
    start = w.starts[index];
    end = w.starts[index + 1];
    total = w.starts[w.num_entries];
  }
  const int share = CeilDiv(total, w.num_groups);
  const int first = start / share, last = (end - 1) / share;
  slots.count = last - first + 1;
  slots.first = int64_t{2} * first + (first * share == start ? 0 : 1);
  slots.second = int64_t{2} * (first + 1);
  slots.step = 2;
  return slots;
}

__global__ void __launch_bounds__(kMergeThreads)
    MergeKernel(JAX_ATTN_PARAMETER SplitKvAttentionParams p, JAX_ATTN_PARAMETER SplitWork w) {
  __shared__ float tops[kMergeThreads];
  __shared__ float totals[kMergeThreads];
  __shared__ float4 sums[kMergeThreads];
  const int num_heads = static_cast<int>(p.num_kv_heads);
  const int row = blockIdx.x % w.rows_per_block;
  const int kv_head = blockIdx.x / w.rows_per_block % num_heads;
  const int index = blockIdx.x / w.rows_per_block / num_heads;
  const Entry entry(p, w, index);
  WaitForPreviousKernel();
  const Slots slots = SlotsOf(p, w, index);
  if (slots.count == 1 || row >= entry.num_rows) return;

  const int v_head_dim = static_cast<int>(p.v_head_dim);
  // Threads that have the same four values take splits in turn, in an order that is fixed.
  const int columns = v_head_dim / 4;
  const int threads_per_split = columns < kMergeThreads ? columns : kMergeThreads;
  const int parts = kMergeThreads / threads_per_split;
  const int part = threadIdx.x / threads_per_split, column = threadIdx.x % threads_per_split;
  float top = -kInfinity, total = 0;
  float4 sum = {0, 0, 0, 0};
  const auto add = [&](float other_top, float other_total, const float4& x) {
    const float new_top = Max(top, other_top), base = Base(new_top);
    const float keep = Exp2(top - base), factor = Exp2(other_top - base);
    top = new_top;
    total = keep * total + factor * other_total;
    sum.x = keep * sum.x + factor * x.x;
    sum.y = keep * sum.y + factor * x.y;
    sum.z = keep * sum.z + factor * x.z;
    sum.w = keep * sum.w + factor * x.w;
  };
  if (part < parts) {
#pragma unroll 4
    for (int i = part; i < slots.count; i += parts) {
      const float* partial = Partial(p, w, slots.At(i), kv_head);
      const float* state = partial + w.rows_per_block * v_head_dim + row;
      add(state[0], state[w.rows_per_block],
          reinterpret_cast<const float4*>(partial + row * v_head_dim)[column]);
    }
  }
  tops[threadIdx.x] = top;
  totals[threadIdx.x] = total;
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (part != 0) return;
  for (int i = 1; i < parts; ++i) {
    const int other = i * threads_per_split + column;
    add(tops[other], totals[other], sums[other]);
  }
  FinishRow(p, entry.batch_index, kv_head, entry.first_row + row, column * 4, sum, top, total,
            p.sinks.batch.Offset(p.batch, entry.batch_index));
}

}  // namespace

const void* MergeKernelOf() { return reinterpret_cast<const void*>(MergeKernel); }

}  // namespace jax_attn::gpu
