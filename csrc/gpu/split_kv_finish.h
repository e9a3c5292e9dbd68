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
JAX_ATTN_DEVICE float* Partial(const SplitKvAttentionParams& p, const SplitWork& w, int64_t slot,
                               int kv_head) {
  return w.partials + (slot * p.num_kv_heads + kv_head) * w.partial_stride;
}

// Four values of a row, relative to `top`, to the output; the first thread of a row writes its lse.
// `sinks`: where those of the batch index begin.
JAX_ATTN_DEVICE void FinishRow(const SplitKvAttentionParams& p, int64_t batch_index, int kv_head,
                               int row, int d, float4 values, float top, float total,
                               int64_t sinks) {
  const int64_t output_row = batch_index * p.query_len * p.num_q_heads + RowIndex(p, kv_head, row);
  const bool empty = total == 0;
  float final_top = top, final_total = total;
  // What brings the values to the final maximum.
  float to_top = 1.0f;
  if (p.sinks.data != nullptr) {
    const int group = GroupSize(p);
    const float sink = p.sinks.data[sinks + kv_head * group + row % group] * kLog2E;
    final_top = Max(top, sink);
    if (final_top != -kInfinity && final_top != kInfinity) {
      to_top = Exp2(top - final_top);
      final_total = total * to_top + Exp2(sink - final_top);
    }
  }
  const bool none = empty || final_top == kInfinity;
  const float factor = none ? 0.0f : to_top / final_total;
  const int64_t first = output_row * p.v_head_dim + d;
  const float x[4] = {values.x, values.y, values.z, values.w};
  if (p.query_dtype == DType::kFloat32) {
    float4 out;
    out.x = none ? 0.0f : x[0] * factor;
    out.y = none ? 0.0f : x[1] * factor;
    out.z = none ? 0.0f : x[2] * factor;
    out.w = none ? 0.0f : x[3] * factor;
    *reinterpret_cast<float4*>(static_cast<float*>(p.out) + first) = out;
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
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + first) = out;
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

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_FINISH_H_
