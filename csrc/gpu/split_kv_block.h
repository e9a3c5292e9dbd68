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
JAX_ATTN_DEVICE void MergeWaves(const SplitKvAttentionParams& p, const SplitWork& w,
                                const Segment& s, const BlockShared<Core>& state,
                                const char* rings) {
  constexpr int kWaves = Core::kShape.waves;
  const int v_head_dim = static_cast<int>(p.v_head_dim), columns = v_head_dim / 4;
  for (int i = threadIdx.x; i < s.num_rows * columns; i += blockDim.x) {
    const int row = i / columns, d = i % columns * 4;
    float top = state.tops[0][row];
#pragma unroll
    for (int wave = 1; wave < kWaves; ++wave) top = Max(top, state.tops[wave][row]);
    const float base = Base(top);
    float total = 0;
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
      const float factor = Exp2(state.tops[wave][row] - base);
      const float4 x = reinterpret_cast<const float4*>(rings + wave * w.wave_bytes)[i];
      total += factor * state.totals[wave][row];
      sum.x += factor * x.x;
      sum.y += factor * x.y;
      sum.z += factor * x.z;
      sum.w += factor * x.w;
    }
    sum.x *= s.value_factor;
    sum.y *= s.value_factor;
    sum.z *= s.value_factor;
    sum.w *= s.value_factor;
    if (s.slot < 0) {
      FinishRow(p, s.batch_index, s.kv_head, s.first_row + row, d, sum, top, total,
                state.offsets.sinks);
      continue;
    }
    float* partial = Partial(p, w, s.slot, s.kv_head);
    *reinterpret_cast<float4*>(partial + row * v_head_dim + d) = sum;
    if (d == 0) {
      float* states = partial + w.rows_per_block * v_head_dim;
      states[row] = top;
      states[w.rows_per_block + row] = total;
    }
  }
}

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
  MergeWaves(p, w, s, state, rings);
}

template <typename Core>
__global__ void __launch_bounds__(Core::kShape.waves* kWave, Core::kShape.matrix ? 0 : 1)
    SplitKvKernel(JAX_ATTN_PARAMETER SplitKvAttentionParams p, JAX_ATTN_PARAMETER SplitWork w) {
  JAX_ATTN_DYNAMIC_SHARED(shared);
  __shared__ BlockShared<Core> state;
  AllowNextKernel();
  const int num_heads = static_cast<int>(p.num_kv_heads);
  const int group = blockIdx.x / num_heads, kv_head = blockIdx.x % num_heads;
  if (w.cut != Cut::kShares) {
    const Entry entry(p, w, group / w.max_splits);
    const FixedSplits splits(w, entry.keys);
    const int split = group % w.max_splits;
    if (split >= splits.count) return;
    RunSegment<Core>(p, w, entry, kv_head, splits.Split(entry.keys, split),
                     splits.count == 1 ? -1 : group, state, shared);
    return;
  }
  const bool writes = w.starts != nullptr && blockIdx.x == 0 && WaveIndex() == 0;
  Place place = FindShare(p, w, group, writes);
  for (bool first = true; place.units > 0; first = false) {
    const Entry entry(p, w, place.entry);
    const int units = entry.units(w);
    const int taken = min(units - place.offset, place.units);
    const int begin = entry.keys.begin + place.offset * w.unit_keys;
    const KeyRange keys{begin, min(entry.keys.end, begin + taken * w.unit_keys)};
    const int64_t slot = taken == units ? -1 : int64_t{2} * group + (first ? 0 : 1);
    if (!first) __syncthreads();  // what the waves exchanged has been read
    RunSegment<Core>(p, w, entry, kv_head, keys, slot, state, shared);
    place.units -= taken;
    place.offset = 0;
    ++place.entry;
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_BLOCK_H_
