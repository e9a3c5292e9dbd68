// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// From the dot products of rows with a tile of keys to the weights of its values: logits, masks and
// the running softmax.

#ifndef JAX_ATTN_CSRC_CPU_ROW_WEIGHTS_H_
#define JAX_ATTN_CSRC_CPU_ROW_WEIGHTS_H_

#include <cstdint>

#include "../math/convert.h"
#include "kv_tile.h"
#include "simd.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kInfinity = __builtin_inff();

// ---- Logits

inline void AddBias(const RowOperand& bias, int64_t offset, int64_t num_keys, float* s) {
  if (bias.dtype == DType::kFloat32) {
    const float* row = static_cast<const float*>(bias.data) + offset;
    for (int64_t j = 0; j < num_keys; ++j) s[j] += row[j];
  } else {
    const uint16_t* row = static_cast<const uint16_t*>(bias.data) + offset;
    const bool is_bfloat16 = bias.dtype == DType::kBFloat16;
    for (int64_t j = 0; j < num_keys; ++j) {
      s[j] += is_bfloat16 ? FromBFloat16(row[j]) : FromFloat16(row[j]);
    }
  }
}

// Whether a row's logits are its dot products times one factor.
inline bool LogitsAreProducts(const Sequence& seq) {
  const SplitKvAttentionParams& p = seq.p;
  return p.logits_soft_cap == 0 && p.bias.data == nullptr && p.alibi_slopes.data == nullptr &&
         !seq.k_scale.per_token();
}

// Turns one row's dot products into logits in base 2; keys that the row does not see get -inf.
template <int64_t kKeys>
inline void Logits(const Sequence& seq, const Tile<kKeys>& tile, const bool* seen, int64_t kv_head,
                   int64_t row, float* s) {
  const SplitKvAttentionParams& p = seq.p;
  const int64_t query = seq.QueryOf(row), head = seq.HeadOf(kv_head, row);
  const bool plain = LogitsAreProducts(seq);
  const float factor = p.scale * seq.k_scale.OfHead(kv_head) * (plain ? kLog2E : 1.0f);
  for (int64_t j = 0; j < kKeys; j += kLanes) Store(s + j, Load(s + j) * factor);
  if (!plain) {
    if (seq.k_scale.per_token()) {
      for (int64_t j = 0; j < tile.num_keys; ++j) {
        if (seen[j]) s[j] *= seq.k_scale.OfToken(seq.k, kv_head, tile.first_key + j);
      }
    }
    if (p.logits_soft_cap != 0) {
      const float cap = p.logits_soft_cap;
      for (int64_t j = 0; j < kKeys; j += kLanes) {
        Store(s + j, cap * Tanh(Load(s + j) * (1.0f / cap)));
      }
    }
    if (p.bias.data != nullptr) {
      const int64_t offset = p.bias.batch.Offset(p.batch, seq.item.batch_index) +
                             head * p.bias.head_stride + query * p.bias.query_stride +
                             tile.first_key;
      AddBias(p.bias, offset, tile.num_keys, s);
    }
    if (p.alibi_slopes.data != nullptr) {
      const float slope = p.alibi_slopes.At(p.batch, seq.item.batch_index)[head];
      const int64_t position = seq.context.first_query + query;
      for (int64_t j = 0; j < tile.num_keys; ++j) {
        const int64_t distance = position - (tile.first_key + j);
        s[j] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
      }
    }
    for (int64_t j = 0; j < kKeys; j += kLanes) Store(s + j, Load(s + j) * kLog2E);
  }
  const KeyRange visible = VisibleKeys(p, seq.context, query);
  const int64_t first = visible.begin - tile.first_key;
  int64_t last = visible.end - tile.first_key;
  if (last > tile.num_keys) last = tile.num_keys;
  for (int64_t j = 0; j < first && j < kKeys; ++j) s[j] = -kInfinity;
  for (int64_t j = last < 0 ? 0 : last; j < kKeys; ++j) s[j] = -kInfinity;
  if (p.mask.data != nullptr) {
    const uint8_t* mask = seq.MaskRow(kv_head, row) + tile.first_key;
    for (int64_t j = 0; j < tile.num_keys; ++j) {
      if (mask[j] == 0) s[j] = -kInfinity;
    }
  }
}

// ---- Running softmax

// The state of consecutive rows.
struct RowStates {
  float* tops;     // [row], the largest logit so far (base 2)
  float* totals;   // [row][kLanes], the sum of 2^(logit - top), in as many parts as there are lanes
  float* outputs;  // [row][stride], the sum of 2^(logit - top) times value
  int64_t stride;

  RowStates From(int64_t row) const {
    return {tops + row, totals + row * kLanes, outputs + row * stride, stride};
  }
  void Clear(int64_t rows) const {
    for (int64_t row = 0; row < rows; ++row) tops[row] = -kInfinity;
    for (int64_t i = 0; i < rows * kLanes; ++i) totals[i] = 0;
    for (int64_t i = 0; i < rows * stride; ++i) outputs[i] = 0;
  }
  float Total(int64_t row) const { return Sum(Load(totals + row * kLanes)); }
};

// Raises a row's maximum to the largest of its logits, and brings what it has to that.
template <int64_t kKeys>
inline void RaiseTop(const float* s, const RowStates& row) {
  F32 largest = Load(s);
  for (int64_t j = kLanes; j < kKeys; j += kLanes) largest = Max(Load(s + j), largest);
  const float top = MaxLane(largest), old_top = *row.tops;
  if (top <= old_top) return;
  *row.tops = top;
  if (old_top == -kInfinity) return;  // it has nothing yet
  const float factor = Exp2(old_top - top);
  Store(row.totals, Load(row.totals) * factor);
  for (int64_t i = 0; i < row.stride; i += kLanes) {
    Store(row.outputs + i, Load(row.outputs + i) * factor);
  }
}

// Folds the logits of kRows rows, `factor` times s, into their states and replaces them by weights.
// The maximum of a row seldom rises after its first tiles, so comparing comes first; and rows go
// side by side, since each alone waits on itself.
template <int kRows, int64_t kKeys>
inline void Weigh(float factor, float* s, const RowStates& rows) {
  constexpr int kVectors = kKeys / kLanes;
  I32 rises = {};
  for (int r = 0; r < kRows; ++r) {
    const F32 top = Broadcast(rows.tops[r]);
    JAX_ATTN_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      float* at = s + r * kKeys + i * kLanes;
      const F32 logits = Load(at) * factor;
      Store(at, logits);
      rises |= ~(logits <= top);  // also if NaN
    }
  }
  if (Any(rises)) {
    for (int r = 0; r < kRows; ++r) RaiseTop<kKeys>(s + r * kKeys, rows.From(r));
  }
  for (int r = 0; r < kRows; ++r) {
    // If nothing was seen yet, 0 stands in for the maximum, since -inf - -inf would be NaN.
    const float top = rows.tops[r] == -kInfinity ? 0.0f : rows.tops[r];
    F32 total = Load(rows.totals + r * kLanes);
    JAX_ATTN_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      float* at = s + r * kKeys + i * kLanes;
      const F32 weight = Exp2(Load(at) - top);
      Store(at, weight);
      total += weight;
    }
    Store(rows.totals + r * kLanes, total);
  }
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_ROW_WEIGHTS_H_
