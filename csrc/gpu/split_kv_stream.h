// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Split-KV attention as a stream: keys and values of 16 or 8 bits that come through tensor maps,
// without extras. Each wave has a ring of tiles, and begins the copy of a tile as soon as there is
// room, also when that tile belongs to the next entry. So copies never pause, and one block fills a
// core.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_H_

#include <cstdint>
#include <type_traits>

#include "split_kv_finish.h"
#include "split_kv_stream_core.h"
#include "split_kv_stream_tiles.h"
#include "split_kv_work.h"

namespace jax_attn::gpu {

#if JAX_ATTN_TENSOR_COPIES

// Fetches a parameter, each wave a part of it: all of it at once, instead of piece by piece when
// they are needed.
template <typename T>
JAX_ATTN_DEVICE void TouchParameters(const T& parameter, int wave) {
  constexpr int kLine = 64, kLines = sizeof(T) / kLine;
  const int line = wave % (kLines > 0 ? kLines : 1);
  const uint32_t word = reinterpret_cast<const uint32_t*>(&parameter)[line * (kLine / 4)];
  asm volatile("" ::"r"(word));
}

// Brings to L2 what a block with lengths asks for first: lengths, and the page ids that it needs if
// all contexts are full. L2 sees what the kernel before may still write.
JAX_ATTN_DEVICE void PrefetchStart(const StreamParams& p, const SplitWork& w, int group, int step) {
  constexpr int kLine = 128 / sizeof(int32_t);
  const int num_batches = w.row_blocks.Divide(w.num_entries);
  if (p.kv_lengths.data != nullptr && Lane() * kLine < num_batches) {
    PrefetchLine(p.kv_lengths.At(p.batch, Lane() * kLine));
  }
  if (p.page_size == 0) return;
  int entry, key;
  if (w.cut == Cut::kShares) {
    const int start = static_cast<int>(w.shares.Begin(group));
    entry = w.units.Divide(start);
    key = (start - entry * w.units.divisor()) * w.unit_keys;
  } else {
    entry = w.splits.Divide(group);
    key = w.splits.Remainder(group) * w.splits.Divide(p.kv_len);
  }
  key += Lane() * step;
  if (entry >= w.num_entries || key >= p.kv_len) return;
  PrefetchLine(p.page_table.At(p.batch, w.row_blocks.Divide(entry)) + p.pages.Divide(key));
}

// Merges the partial results of the blocks of a cluster, each a part of the rows. Without writing,
// those of other blocks are not touched.
JAX_ATTN_DEVICE void MergeCluster(const StreamParams& p, const SplitWork& w, const EntryRows& rows,
                                  int kv_head, const float* partial, int v_head_dim, int rank,
                                  const BlockThreads& threads) {
  const int columns = v_head_dim / 4;
  const int first = threads.index * kMaxCluster + rank;
  for (int i = first; i < rows.num_rows * columns; i += threads.count * kMaxCluster) {
    const int row = i / columns, column = i % columns;
    RowState state;
#pragma unroll
    for (int block = 0; block < kMaxCluster; ++block) {
      state.Add(
          LoadPartial(InBlock(threads.write ? block : rank, partial), w, v_head_dim, row, column));
    }
    FinishRow(p, rows.batch_index, kv_head, rows.first_row + row, column * 4, state.sum, state.top,
              state.total, 0, threads.write);
  }
}

#endif  // JAX_ATTN_TENSOR_COPIES

#if JAX_ATTN_NVIDIA

// Waves of a block: those that have tiles, and a spare one.
template <int kDim, int kRows>
inline constexpr int kStreamThreads = (StreamShape(kDim, kRows, 2).waves + 1) * kWave;

template <DType kStored>
using StreamParamsOf = std::conditional_t<SizeOf(kStored) == 1, ScaledStreamParams, StreamParams>;

template <DType kStored, int kDim, int kRows>
__global__ void __launch_bounds__(kStreamThreads<kDim, kRows>, 1)
    StreamSplitKernel(JAX_ATTN_PARAMETER TensorMap k, JAX_ATTN_PARAMETER TensorMap v,
                      JAX_ATTN_PARAMETER StreamParamsOf<kStored> p,
                      JAX_ATTN_PARAMETER SplitWork w) {
#if JAX_ATTN_TENSOR_COPIES
  constexpr KernelShape kShape = StreamShape(kDim, kRows, static_cast<int>(SizeOf(kStored)));
  constexpr int kWaves = kShape.waves, kStages = kShape.stages, kTileKeys = kShape.tile_keys;
  extern __shared__ __align__(1024) char rings[];
  const int wave = Broadcast(WaveIndex(), 0);  // the same in all lanes, as the compiler can see
  TouchParameters(p, wave);
  TouchParameters(w, wave);
  // Keys of the call before have thrown instructions and parameters out of the caches, and each is
  // a wait. The spare wave goes through the end of an entry at once, so that they are there when
  // the others come to it; later it only keeps step.
  const bool is_spare = wave == kWaves;
  float* const outputs = reinterpret_cast<float*>(rings + StreamRingBytes(kShape));
  float* const tops = outputs + StreamOutputBytes(kShape) / 4;
  float* const totals = tops + kWaves * kRows;
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(totals + kWaves * kRows) + wave * kStages;
  if (Lane() == 0 && !is_spare) {
    PrefetchMap(k);
    PrefetchMap(v);
#pragma unroll
    for (int i = 0; i < kStages; ++i) CopyBarrier(barriers + i).Initialize();
    CopyBarrier::Publish();
  }
  WaveFence();
  // Kernels with many rows have no registers left for clusters.
  const int cluster = kRows == kMatrixRows[0] ? w.cluster : 1;
  const int rank = cluster == 1 ? 0 : RankInCluster();
  const int block = cluster == 1 ? blockIdx.x : blockIdx.x / kMaxCluster;
  const int kv_head = w.kv_heads.Remainder(block);
  const int group = w.kv_heads.Divide(block) * cluster + rank;
  // The kernel before may still run, and write what this one reads: all but its parameters.
  if (!w.uniform) {
    if (is_spare) PrefetchStart(p, w, group, kWaves * kTileKeys);
    WaitForPreviousKernel();
  }
  using Walk = TileWalk<kTileKeys, kWaves>;
  Walk walk(p, w, group, wave);
  WaitForPreviousKernel();
  if (is_spare && walk.more()) {
    PrefetchQueries<kDim>(p, walk.rows(), kv_head);
    if constexpr (SizeOf(kStored) == 1) PrefetchScales(p, walk.rows(), kv_head);
  }
  // Before any copy: it waits for those that are under way.
  if (w.merged || w.allows_next) AllowNextKernel();
  TileStream<Walk, kDim, kStages> tiles(k, v, p, walk, kv_head,
                                        rings + wave * kStages * StreamStageBytes(kShape), barriers,
                                        !is_spare);
  bool rehearses = is_spare;
  for (bool more = walk.more(); more;) {
    StreamCore<kStored, kDim, kRows> core(p, walk.rows(), kv_head);
    if (!is_spare) {
      for (; walk.InPart(); walk.NextTile()) {
        core.Attend(p, walk, tiles.Wait());
        tiles.Release();
      }
    }
    if (!rehearses) __syncthreads();  // what the waves exchanged before has been read
    constexpr int kRowStride = StreamOutputStride(kDim) / 4;
    const int at = is_spare ? 0 : wave * kRows;
    if (!is_spare || rehearses) core.Finish(outputs + at * kRowStride, tops + at, totals + at);
    if (rehearses) {
      WaveFence();  // its lanes read what they wrote
    } else {
      __syncthreads();
    }
    if (!is_spare || rehearses) {
      const WaveResults results{outputs, kRows * kRowStride, kRowStride, tops, totals};
      const BlockThreads threads{is_spare ? Lane() : static_cast<int>(threadIdx.x), kWaves * kWave,
                                 !rehearses};
      // Blocks of a cluster leave their partial results where their tiles were.
      float* const partial = cluster == 1 ? nullptr : reinterpret_cast<float*>(rings);
      MergeWaves<kWaves, kRows>(p, w, walk.rows(), kv_head, walk.slot(), partial, results, kDim,
                                core.ValueFactor(), 0, threads);
    }
    if (cluster > 1) {
      if (!rehearses) SyncCluster();
      if (!is_spare || rehearses) {
        MergeCluster(
            p, w, walk.rows(), kv_head, reinterpret_cast<const float*>(rings), kDim, rank,
            {is_spare ? Lane() : static_cast<int>(threadIdx.x), kWaves * kWave, !rehearses});
      }
      if (!rehearses) SyncCluster();  // a block stays while others read its shared memory
    }
    if (!rehearses) more = walk.NextPart();
    rehearses = false;
  }
#endif
}

#endif  // JAX_ATTN_NVIDIA

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_H_
