// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Rotary position embedding of the fused QKV pass: the factors of a token, and the rotation of a
// head of any size.

#ifndef JAX_ATTN_CSRC_CPU_QKV_ROTATION_H_
#define JAX_ATTN_CSRC_CPU_QKV_ROTATION_H_

#include "qkv_rows.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

// Factors of the rotary dims of a token: y[i] = x[i] * cos[i] + x[partner of i] * sin[i].
struct Angles {
  Head cos;
  Head sin;
};

int64_t TableRow(const FusedQkvRopeCacheParams& p, int64_t batch_index, int64_t token,
                 int64_t axis) {
  uint32_t position = p.positions.At(p.batch, batch_index)[axis * p.num_tokens + token];
  // Sums wrap around as they do in XLA.
  if (p.offsets.data != nullptr) position += p.offsets.At(p.batch, batch_index)[token];
  const int64_t row = static_cast<int32_t>(position);
  return row < 0 ? 0 : row >= p.max_positions ? p.max_positions - 1 : row;
}

// Reads the rows of a table that turn a token, one for each pair or each dim.
void LoadTableRow(const FusedQkvRopeCacheParams& p, const FloatOperand& table, const QkvItem& item,
                  const int64_t* rows, float* to) {
  const int64_t first = table.batch.Offset(p.batch, item.batch_index), width = p.table_width;
  DecodeFloats(table.data, table.dtype, first + rows[0] * width, width, to);
  if (!p.has_mrope) return;
  const int64_t pairs = p.rotary_dim / 2;
  for (int axis = 1; axis < 3; ++axis) {
    Head other;
    DecodeFloats(table.data, table.dtype, first + rows[axis] * width, width, other.values);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t pair = !p.full_width_table ? i : p.interleaved ? i / 2 : i % pairs;
      if (item.mrope_axes[pair] == axis) to[i] = other.values[i];
    }
  }
}

void LoadAngles(const FusedQkvRopeCacheParams& p, const QkvItem& item, int64_t token,
                Angles& angles) {
  int64_t rows[3] = {};
  for (int axis = 0; axis < (p.has_mrope ? 3 : 1); ++axis) {
    rows[axis] = TableRow(p, item.batch_index, token, axis);
  }
  float* const cos = angles.cos.values;
  float* const sin = angles.sin.values;
  LoadTableRow(p, p.cos, item, rows, cos);
  LoadTableRow(p, p.sin, item, rows, sin);
  const int64_t pairs = p.rotary_dim / 2;
  if (p.interleaved) {
    for (int64_t i = pairs; i-- > 0;) {
      const int64_t first = p.full_width_table ? 2 * i : i;
      const int64_t second = p.full_width_table ? 2 * i + 1 : i;
      const float cos_first = cos[first], cos_second = cos[second];
      const float sin_first = sin[first], sin_second = sin[second];
      cos[2 * i] = cos_first;
      cos[2 * i + 1] = cos_second;
      sin[2 * i] = -sin_first;
      sin[2 * i + 1] = sin_second;
    }
  } else {
    if (!p.full_width_table) {
      memcpy(cos + pairs, cos, pairs * sizeof(float));
      memcpy(sin + pairs, sin, pairs * sizeof(float));
    }
    for (int64_t i = 0; i < pairs; ++i) sin[i] = -sin[i];
  }
}

F32 Neighbours(F32 v) { return Partners<1>(v, std::make_integer_sequence<int, kLanes>()); }

// Rotates the `n` dims at x into y. The last vector may overlap the one before it.
void RotateNeighbours(const float* x, const Angles& angles, int64_t n, float* y) {
  const float *cos = angles.cos.values, *sin = angles.sin.values;
  if (n < kLanes) {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * cos[i] + x[i ^ 1] * sin[i];
    return;
  }
  for (int64_t next = 0; next < n; next += kLanes) {
    const int64_t i = next + kLanes <= n ? next : n - kLanes;
    const F32 v = Load(x + i);
    Store(y + i, v * Load(cos + i) + Neighbours(v) * Load(sin + i));
  }
}

void RotateHalves(const float* x, const Angles& angles, int64_t n, float* y) {
  const int64_t half = n / 2;
  const float *cos = angles.cos.values, *sin = angles.sin.values;
  if (half < kLanes) {
    for (int64_t i = 0; i < half; ++i) {
      y[i] = x[i] * cos[i] + x[i + half] * sin[i];
      y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
    }
    return;
  }
  for (int64_t next = 0; next < half; next += kLanes) {
    const int64_t i = next + kLanes <= half ? next : half - kLanes, j = i + half;
    const F32 first = Load(x + i), second = Load(x + j);
    Store(y + i, first * Load(cos + i) + second * Load(sin + i));
    Store(y + j, second * Load(cos + j) + first * Load(sin + j));
  }
}

// Rotates the rotary dims of a head from x to y; the others are moved.
void Rotate(const FusedQkvRopeCacheParams& p, const Angles& angles, const float* x, float* y) {
  const int64_t start = p.nope_first ? p.head_dim - p.rotary_dim : 0;
  if (p.rotary_dim != p.head_dim) memcpy(y, x, p.head_dim * sizeof(float));
  if (p.interleaved) {
    RotateNeighbours(x + start, angles, p.rotary_dim, y + start);
  } else {
    RotateHalves(x + start, angles, p.rotary_dim, y + start);
  }
}

}  // namespace
}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_QKV_ROTATION_H_
