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
    const int thread = FreshOfLane(static_cast<int>(threadIdx.x));
    for (int row = thread; row < Core::kShape.rows; row += Core::kShape.waves * kWave) {
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
  // While tiles are worked on, this waits in registers of lanes.
  const int waiting_wave = FreshOfLane(wave), waiting_head = FreshOfLane(kv_head);
  const int64_t waiting_slot = FreshOfLane(slot);
  const int64_t waiting_index = FreshOfLane(entry.batch_index);
  Tile tile;
  while (tiles.More()) {
    tiles.Next(tile);
    core.Attend(tile);
  }
  WaveFence();  // the last tile has been read; outputs take its place
  const SplitKvAttentionParams& later_p = FreshParameter(p);
  const SplitWork& later_w = FreshParameter<SplitKvAttentionParams>(w);
  const int same_wave = Uniform(waiting_wave);
  EntryRows rows = entry;
  rows.batch_index = Uniform(waiting_index);
  char* const outputs = shared + later_w.query_bytes;
  core.Finish(reinterpret_cast<float*>(outputs + same_wave * later_w.wave_bytes),
              state.tops[same_wave], state.totals[same_wave]);
  __syncthreads();
  const int v_head_dim = static_cast<int>(later_p.v_head_dim);
  const WaveResults results{reinterpret_cast<const float*>(outputs), later_w.wave_bytes / 4,
                            v_head_dim, state.tops[0], state.totals[0]};
  MergeWaves<Core::kShape.waves, Core::kShape.rows>(
      later_p, later_w, rows, Uniform(waiting_head), Uniform(waiting_slot), nullptr, results,
      v_head_dim, s.value_factor, state.offsets.sinks,
      {static_cast<int>(threadIdx.x), Core::kShape.waves * kWave});
}

template <typename Core>
__global__ void __launch_bounds__(Core::kShape.waves* kWave, Core::kShape.matrix ? 0 : 1)
    SplitKvKernel(JAX_ATTN_PARAMETER SplitKvAttentionParams p, JAX_ATTN_PARAMETER SplitWork w) {
  JAX_ATTN_DYNAMIC_SHARED(shared);
  __shared__ BlockShared<Core> state;
  AllowNextKernel();
  constexpr bool kFits =
      !Core::kShape.matrix ||
      HoldsOutputs(Core::kShape.max_dim, Core::kShape.rows, kWave, kCopiesThroughRegisters);
  if (!kFits) return;  // such a kernel is not chosen
  Parts parts(p, w, w.kv_heads.Divide(blockIdx.x));
  const int block = FreshOfLane(static_cast<int>(blockIdx.x));  // waits like the parts
  while (parts.More()) {
    const SplitKvAttentionParams& fresh_p = FreshParameter(p);
    const SplitWork& fresh_w = FreshParameter<SplitKvAttentionParams>(w);
    const Entry entry(fresh_p, fresh_w, parts.entry());
    KeyRange keys;
    int64_t slot;
    if (!parts.Next(fresh_w, entry, keys, slot)) break;
    const int kv_head = Uniform(block) - parts.group() * fresh_w.kv_heads.divisor();
    parts.Rest();
    RunSegment<Core>(fresh_p, fresh_w, entry, kv_head, keys, slot, state, shared);
    parts.Resume();
    if (parts.More()) __syncthreads();  // what the waves exchanged has been read
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_BLOCK_H_
