// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Split-KV attention of small calls in one kernel: a cluster of blocks has one entry and kv head,
// each block a part of its tiles, and its blocks send each other what they find. Lengths change
// nothing about that. Tiles come as in stream kernels (split_kv_stream.h), and mostly there is room
// for all of them at once.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_CLUSTER_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_CLUSTER_H_

#include <cstddef>
#include <cstdint>

#include "split_kv_stream.h"

namespace jax_attn::gpu {

#if JAX_ATTN_TENSOR_COPIES

// Brings to L2 what a block with lengths asks for first: its length, and the page ids that it needs
// if the context is full. L2 sees what the kernel before may still write.
JAX_ATTN_DEVICE void PrefetchStart(const StreamParams& p, int batch_index, int step) {
  if (p.kv_lengths.data != nullptr && Lane() == 0) {
    PrefetchLine(p.kv_lengths.At(p.batch, batch_index));
  }
  if (p.page_size == 0) return;
  const int key = Lane() * step;
  if (key < p.kv_len) PrefetchLine(p.page_table.At(p.batch, batch_index) + p.pages.Divide(key));
}

// What the blocks of a cluster send each other: fours of values of all rows, which belong to them
// in turn. A barrier counts the bytes that a block is sent.
class Inbox {
 public:
  JAX_ATTN_DEVICE Inbox(char* shared, uint64_t* barrier, const SplitWork& w, int rank,
                        int num_items)
      : items_(reinterpret_cast<RowState*>(shared)),
        barrier_(barrier),
        blocks_(w.splits),
        rank_(rank),
        num_items_(num_items),
        per_block_(w.splits.Divide(num_items + w.splits.divisor() - 1)) {}

  // One thread says how many blocks will send what they have found.
  JAX_ATTN_DEVICE void Expect(int num_blocks) const {
    const int own = blocks_.Divide(num_items_ - rank_ + blocks_.divisor() - 1);
    barrier_.Expect(num_blocks * own * kBytes);
  }
  JAX_ATTN_DEVICE void Wait() const { barrier_.WaitForBlocks(0); }

  // Sends what the block has found of an item to the one that the item belongs to, if `sends`.
  JAX_ATTN_DEVICE void Send(int item, const RowState& state, bool sends) const {
    const int place = blocks_.Divide(item), owner = item - place * blocks_.divisor();
    const RowState* const to = items_ + rank_ * per_block_ + place;
    SendToBlock(owner, &to->sum, barrier_, state.sum, sends);
    SendToBlock(owner, &to->top, barrier_, float2{state.top, state.total}, sends);
  }

  // The item at `place` of those that belong to the block.
  JAX_ATTN_DEVICE int ItemAt(int place) const { return place * blocks_.divisor() + rank_; }

  // What `num_blocks` blocks have found of it.
  JAX_ATTN_DEVICE RowState Merge(int num_blocks, int place) const {
    RowState state;
    for (int i = 0; i < num_blocks; ++i) state.Add(items_[i * per_block_ + place]);
    return state;
  }

 private:
  static constexpr int kBytes = sizeof(float4) + sizeof(float2);

  RowState* items_;  // [block that sent it][place]
  CopyBarrier barrier_;
  Divisor blocks_;
  int rank_;
  int num_items_;
  int per_block_;
};
static_assert(sizeof(RowState) == kClusterItemBytes && offsetof(RowState, total) == sizeof(float));

#endif  // JAX_ATTN_TENSOR_COPIES

#if JAX_ATTN_NVIDIA

template <int kDim, int kRows>
inline constexpr int kClusterThreads = (ClusterShape(kDim, kRows, 2).waves + 1) * kWave;

template <DType kStored, int kDim, int kRows>
__global__ void __launch_bounds__(kClusterThreads<kDim, kRows>, 1)
    ClusterSplitKernel(JAX_ATTN_PARAMETER TensorMap k, JAX_ATTN_PARAMETER TensorMap v,
                       JAX_ATTN_PARAMETER StreamParamsOf<kStored> p,
                       JAX_ATTN_PARAMETER SplitWork w) {
#if JAX_ATTN_TENSOR_COPIES
  constexpr KernelShape kShape = ClusterShape(kDim, kRows, static_cast<int>(SizeOf(kStored)));
  constexpr int kWaves = kShape.waves, kStages = kShape.stages, kTileKeys = kShape.tile_keys;
  constexpr int kRingBytes = kStages * StreamStageBytes(kShape);  // of a wave
  constexpr int kRowStride = StreamOutputStride(kDim) / 4, kColumns = kDim / 4;
  static_assert(4 * kRows * kRowStride <= kRingBytes);
  static_assert(4 * kRows * (kRowStride + 2) <= ClusterInboxBytes(kShape));
  extern __shared__ __align__(1024) char rings[];
  const int wave = Broadcast(WaveIndex(), 0);  // the same in all lanes, as the compiler can see
  TouchParameters(p, wave);
  TouchParameters(w, wave);
  // As in StreamSplitKernel, the spare wave goes through the end at once, so that instructions are
  // there when the others come to it. It has the inbox to itself: until it arrives, none is sent.
  const bool is_spare = wave == kWaves;
  char* const ring = rings + wave * kRingBytes;
  char* const inbox_bytes = rings + kWaves * kRingBytes;
  float* const tops = reinterpret_cast<float*>(inbox_bytes + ClusterInboxBytes(kShape));
  float* const totals = tops + kWaves * kRows;
  uint64_t* const all_barriers = reinterpret_cast<uint64_t*>(totals + kWaves * kRows);
  uint64_t* const barriers = all_barriers + wave * kStages;  // of the spare wave: one of the inbox
  if (Lane() == 0) {
    if (!is_spare) {
      PrefetchMap(k);
      PrefetchMap(v);
    }
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      if (i == 0 || !is_spare) CopyBarrier(barriers + i).Initialize();
    }
    CopyBarrier::Publish();
  }
  WaveFence();
  if (!is_spare) ArriveInCluster(false);
  const int rank = RankInCluster(), cluster = w.splits.Divide(blockIdx.x);
  const int kv_head = w.kv_heads.Remainder(cluster), entry = w.kv_heads.Divide(cluster);
  // The kernel before may still run, and write what this one reads: all but its parameters.
  if (is_spare) PrefetchStart(p, w.row_blocks.Divide(entry), kWaves * kTileKeys);
  WaitForPreviousKernel();
  const EntryRows rows(p, w, entry);
  // Queries are asked for first, since behind copies they would have to wait, and by the wave that
  // begins none.
  if (is_spare) {
    ForQueryLines<kDim>(p, rows, kv_head, [](const uint16_t* line) { FetchLine(line); });
  }
  using Walk = ClusterWalk<kTileKeys, kWaves>;
  Walk walk(p, w, entry, rank, wave);
  if (w.allows_next) AllowNextKernel();  // before any copy: it waits for those that are under way
  TileStream<Walk, kDim, kStages> tiles(k, v, p, walk, kv_head, ring, barriers, !is_spare);
  StreamCore<kStored, kDim, kRows> core(p, rows, kv_head);
  if (!is_spare) {
    for (; walk.InPart(); walk.NextTile()) {
      core.Attend(p, walk, tiles.Wait());
      tiles.Release();
    }
  }
  // A wave leaves outputs where its tiles were.
  float* const own = reinterpret_cast<float*>(is_spare ? inbox_bytes : ring);
  float* const spare_tops = own + kRows * kRowStride;
  core.Finish(own, is_spare ? spare_tops : tops + wave * kRows,
              is_spare ? spare_tops + kRows : totals + wave * kRows);
  const int num_items = rows.num_rows * kColumns, num_parts = walk.num_parts();
  const Inbox inbox(inbox_bytes, all_barriers + kWaves * kStages, w, rank, num_items);
  if (is_spare) {
    if (Lane() == 0) inbox.Expect(num_parts);
    WaveFence();  // its lanes read what they wrote
  } else {
    SyncFirstThreads<kWaves * kWave>();
    WaitForCluster();  // until then other blocks may not be there
  }
  const WaveResults results =
      is_spare
          ? WaveResults{own, 0, kRowStride, spare_tops, spare_tops + kRows}
          : WaveResults{reinterpret_cast<float*>(rings), kRingBytes / 4, kRowStride, tops, totals};
  const int first = is_spare ? Lane() : static_cast<int>(threadIdx.x);
  const int end = is_spare || rank < num_parts ? num_items : 0;
  for (int i = first; i < end; i += kWaves * kWave) {
    const RowState state =
        MergeWavesOfRow<kWaves, kRows>(results, i / kColumns, i % kColumns * 4, core.ValueFactor());
    inbox.Send(i, state, !is_spare);
  }
  if (!is_spare) inbox.Wait();
  for (int place = first; inbox.ItemAt(place) < num_items; place += kWaves * kWave) {
    const RowState state = inbox.Merge(num_parts, place);
    const int i = inbox.ItemAt(place);
    FinishRow(p, rows.batch_index, kv_head, rows.first_row + i / kColumns, i % kColumns * 4,
              state.sum, state.top, state.total, 0, !is_spare);
  }
  if (is_spare) {
    ArriveInCluster(true);
    WaitForCluster();
  }
#endif
}

#endif  // JAX_ATTN_NVIDIA

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_CLUSTER_H_
