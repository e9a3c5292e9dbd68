// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// From unnormalised outputs of a row to its output and log-sum-exp.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_FINISH_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_FINISH_H_

#include <cstdint>

#include "elements.h"
#include "split_kv_logits.h"

namespace jax_attn::gpu {

// A partial result of one kv head: values [rows][v_head_dim], then tops and totals of all rows.
template <typename Params>
JAX_ATTN_DEVICE float* Partial(const Params& p, const SplitWork& w, int64_t slot, int kv_head) {
  return w.partials + (slot * p.num_kv_heads + kv_head) * w.partial_stride;
}

// Four values of a row, relative to `top`, to the output if `writes`; the first thread of a row
// writes its lse. `sinks`: where those of the batch index begin.
template <typename Params>
JAX_ATTN_DEVICE void FinishRow(const Params& p, int64_t batch_index, int kv_head, int row, int d,
                               float4 values, float top, float total, int64_t sinks,
                               bool writes = true) {
  const int64_t output_row = batch_index * p.query_len * p.num_q_heads + RowIndex(p, kv_head, row);
  const bool empty = total == 0;
  float final_top = top, final_total = total;
  // What brings the values to the final maximum.
  float to_top = 1.0f;
  if (p.sinks.data != nullptr) {
    const int group = GroupSize(p), head = kv_head * group + row - QueryOfRow(p, row) * group;
    const float sink = p.sinks.data[sinks + head] * kLog2E;
    final_top = Max(top, sink);
    if (final_top != -kInfinity && final_top != kInfinity) {
      to_top = Exp2(top - final_top);
      final_total = total * to_top + Exp2(sink - final_top);
    }
  }
  const bool none = empty || final_top == kInfinity;
  const float factor = none ? 0.0f : to_top / final_total;
  const int64_t first = output_row * p.v_head_dim + d;
  if (!writes) d = -1;
  const float x[4] = {values.x, values.y, values.z, values.w};
  if (p.query_dtype == DType::kFloat32) {
    float4 out;
    out.x = none ? 0.0f : x[0] * factor;
    out.y = none ? 0.0f : x[1] * factor;
    out.z = none ? 0.0f : x[2] * factor;
    out.w = none ? 0.0f : x[3] * factor;
    if (writes) *reinterpret_cast<float4*>(static_cast<float*>(p.out) + first) = out;
  } else {
    uint2 out;
    const float y[4] = {none ? 0.0f : x[0] * factor, none ? 0.0f : x[1] * factor,
                        none ? 0.0f : x[2] * factor, none ? 0.0f : x[3] * factor};
    if (p.query_dtype == DType::kBFloat16) {
      out.x = Pack<DType::kBFloat16>(y[0], y[1]);
      out.y = Pack<DType::kBFloat16>(y[2], y[3]);
    } else {
      out.x = Pack<DType::kFloat16>(y[0], y[1]);
      out.y = Pack<DType::kFloat16>(y[2], y[3]);
    }
    if (writes) *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + first) = out;
  }
  if (d != 0) return;
  if (!p.lse_includes_sinks) {
    final_top = top;
    final_total = total;
  }
  const bool infinite = final_total == 0 || final_top == kInfinity;
  p.lse[output_row] = infinite ? (final_top == kInfinity ? kInfinity : -kInfinity)
                               : final_top * kLn2 + logf(final_total);
}

struct BlockThreads {
  int index, count;
  bool write = true;  // or only go through the motions
};

// A row's running state and four of its values, relative to `top`.
struct RowState {
  float top = -kInfinity, total = 0;
  float4 sum = {0, 0, 0, 0};

  // Makes `new_top`, which is no smaller, what values are relative to. Parts that are added
  // together do not wait for each other then.
  JAX_ATTN_DEVICE void Raise(float new_top) {
    const float keep = Exp2(top - Base(new_top));
    top = new_top;
    total *= keep;
    sum.x *= keep;
    sum.y *= keep;
    sum.z *= keep;
    sum.w *= keep;
  }

  // Adds a part of the row's keys, whose maximum is no larger.
  JAX_ATTN_DEVICE void AddBelow(float other_top, float other_total, const float4& x) {
    const float factor = Exp2(other_top - Base(top));
    total += factor * other_total;
    sum.x += factor * x.x;
    sum.y += factor * x.y;
    sum.z += factor * x.z;
    sum.w += factor * x.w;
  }

  JAX_ATTN_DEVICE void Add(const RowState& other) {
    Raise(Max(top, other.top));
    AddBelow(other.top, other.total, other.sum);
  }
};

// Four values of a row of a partial result; `column` counts such fours.
JAX_ATTN_DEVICE RowState LoadPartial(const float* partial, const SplitWork& w, int v_head_dim,
                                     int row, int column) {
  const float* const state = partial + w.rows_per_block * v_head_dim + row;
  RowState result;
  result.top = state[0];
  result.total = state[w.rows_per_block];
  result.sum = reinterpret_cast<const float4*>(partial + row * v_head_dim)[column];
  return result;
}

// What the waves of a block have found of the same rows.
struct WaveResults {
  const float* outputs;  // unnormalised, [wave][row][v_head_dim]
  int wave_stride;       // floats
  int row_stride;
  const float* tops;  // [wave][row of the kernel]
  const float* totals;
};

// Four values of a row, of all waves.
template <int kWaves, int kRows>
JAX_ATTN_DEVICE RowState MergeWavesOfRow(const WaveResults& results, int row, int d,
                                         float value_factor) {
  RowState state;
  state.top = results.tops[row];
#pragma unroll
  for (int wave = 1; wave < kWaves; ++wave) {
    state.top = Max(state.top, results.tops[wave * kRows + row]);
  }
#pragma unroll
  for (int wave = 0; wave < kWaves; ++wave) {
    state.AddBelow(results.tops[wave * kRows + row], results.totals[wave * kRows + row],
                   *reinterpret_cast<const float4*>(results.outputs + wave * results.wave_stride +
                                                    row * results.row_stride + d));
  }
  state.sum.x *= value_factor;
  state.sum.y *= value_factor;
  state.sum.z *= value_factor;
  state.sum.w *= value_factor;
  return state;
}

// Merges them, and writes a partial result to `slot`, or to `shared` unless that is null, or the
// output if the slot is negative.
// `v_head_dim` is that of `p`, which may be known when this is compiled.
template <int kWaves, int kRows, typename Params>
JAX_ATTN_DEVICE void MergeWaves(const Params& p, const SplitWork& w, const EntryRows& rows,
                                int kv_head, int64_t slot, float* shared,
                                const WaveResults& results, int v_head_dim, float value_factor,
                                int64_t sinks, const BlockThreads& threads) {
  const int columns = v_head_dim / 4;
  for (int i = threads.index; i < rows.num_rows * columns; i += threads.count) {
    const int row = i / columns, d = i % columns * 4;
    const RowState state = MergeWavesOfRow<kWaves, kRows>(results, row, d, value_factor);
    if (slot < 0) {
      FinishRow(p, rows.batch_index, kv_head, rows.first_row + row, d, state.sum, state.top,
                state.total, sinks, threads.write);
      continue;
    }
    if (!threads.write) continue;
    float* const partial = shared != nullptr ? shared : Partial(p, w, slot, kv_head);
    *reinterpret_cast<float4*>(partial + row * v_head_dim + d) = state.sum;
    if (d == 0) {
      float* states = partial + w.rows_per_block * v_head_dim;
      states[row] = state.top;
      states[w.rows_per_block + row] = state.total;
    }
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_FINISH_H_
