// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The split kernel: a block works on the keys of its group for one kv head. Its waves take tiles in
// turn, each with a state of its own, and merge what they found at the end of an entry.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_BLOCK_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_BLOCK_H_

#include <cstdint>

#include "split_kv_finish.h"
#include "split_kv_logits.h"
#include "split_kv_tiles.h"
#include "split_kv_work.h"

namespace jax_attn::gpu {

template <typename Core>
struct BlockShared {
  BatchOffsets offsets;
  RowInfo rows[Core::kShape.rows];
  float tops[Core::kShape.waves][Core::kShape.rows];
  float totals[Core::kShape.waves][Core::kShape.rows];
};

// Merges what the waves of the block found, and writes it as a partial result or as the output.
template <typename Core>
JAX_ATTN_DEVICE void RunSegment(const SplitKvAttentionParams& p, const SplitWork& w,
                                const Entry& entry, int kv_head, const KeyRange& keys, int64_t slot,
                                BlockShared<Core>& state, char* shared) {
  char* const queries = shared;
  char* const rings = shared + w.query_bytes;
  const int wave = WaveIndex();
  char* const ring = rings + wave * w.wave_bytes;
  FindOffsets(p, w, entry.batch_index, state.offsets);
  __syncthreads();
  const Segment s(p, entry, kv_head, keys, slot, state.rows, state.offsets);
  const auto describe_rows = [&] {
    for (int row = threadIdx.x; row < Core::kShape.rows; row += blockDim.x) {
      DescribeRow(p, state.offsets, entry, kv_head, row, state.rows[row]);
    }
  };
  if constexpr (Core::kExtras) {
    describe_rows();
    __syncthreads();  // the ring asks rows what the mask hides
  }
  // The first copies come before everything that can wait for them.
  TileRing<Core::kStored, Core::kShape.max_dim, Core::kShape.tile_keys, Core::kShape.stages,
           Core::kExtras>
      tiles(p, w, s, ring, wave, Core::kShape.waves);
  Core::StoreQueries(p, s, state.offsets.query, queries);
  if constexpr (!Core::kExtras) describe_rows();
  __syncthreads();
  const int weight_floats = Core::kShape.matrix ? 0 : Core::kShape.rows * Core::kShape.tile_keys;
  Core core(p, s, queries, reinterpret_cast<float*>(ring + w.wave_bytes) - weight_floats);
  Tile tile;
  while (tiles.More()) {
    tiles.Next(tile);
    core.Attend(tile);
  }
  WaveFence();  // the last tile has been read; outputs take its place
  core.Finish(reinterpret_cast<float*>(ring), state.tops[wave], state.totals[wave]);
  __syncthreads();
  const WaveResults results{reinterpret_cast<const float*>(rings), w.wave_bytes / 4,
                            static_cast<int>(p.v_head_dim), state.tops[0], state.totals[0]};
  MergeWaves<Core::kShape.waves, Core::kShape.rows>(
      p, w, entry, kv_head, slot, nullptr, results, static_cast<int>(p.v_head_dim), s.value_factor,
      state.offsets.sinks, {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)});
}

template <typename Core>
__global__ void __launch_bounds__(Core::kShape.waves* kWave, Core::kShape.matrix ? 0 : 1)
    SplitKvKernel(JAX_ATTN_PARAMETER SplitKvAttentionParams p, JAX_ATTN_PARAMETER SplitWork w) {
  JAX_ATTN_DYNAMIC_SHARED(shared);
  __shared__ BlockShared<Core> state;
  AllowNextKernel();
  const int group = w.kv_heads.Divide(blockIdx.x);
  const int kv_head = blockIdx.x - group * w.kv_heads.divisor();
  Parts parts(p, w, group);
  for (bool first = true; parts.More(); first = false) {
    const Entry entry(p, w, parts.entry());
    KeyRange keys;
    int64_t slot;
    if (!parts.Next(w, entry, keys, slot)) break;
    if (!first) __syncthreads();  // what the waves exchanged has been read
    RunSegment<Core>(p, w, entry, kv_head, keys, slot, state, shared);
  }
  if (w.ends != nullptr && kv_head == 0 && threadIdx.x == 0) w.ends[group] = parts.End();
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_BLOCK_H_
