// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Factors of the fused QKV pass: y = (x * own + partner of x * other) * inverse of the norm.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_FACTORS_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_FACTORS_H_

#include <cstdint>

#include "fused_qkv_rows.h"

namespace jax_attn::gpu {

// Operands of a batch index.
template <bool kBatched>
struct QkvIndex {
  const QkvBatch& batch;
  int64_t index;

  JAX_ATTN_DEVICE int64_t Offset(const BatchStrides& strides) const {
    return kBatched ? strides.Offset(batch.shape, index) : 0;
  }
  JAX_ATTN_DEVICE int64_t Times(int64_t stride) const { return kBatched ? index * stride : 0; }
  template <typename T>
  JAX_ATTN_DEVICE const T* At(const T* data, const BatchStrides& strides) const {
    return data + Offset(strides);
  }
};

// Rows of the tables that turn a token.
template <bool kBatched>
class TableRows {
 public:
  JAX_ATTN_DEVICE TableRows(const FusedQkvWork& w, QkvIndex<kBatched> b, int token)
      : w_(w),
        cos_(b.Offset(b.batch.cos)),
        sin_(b.Offset(b.batch.sin)),
        temporal_(w.mrope_sections[0]),
        height_(w.mrope_sections[1]),
        width_(w.mrope_sections[2]) {
    const int32_t* const positions = b.At(w.positions, b.batch.positions);
    uint32_t offset = 0;
    if (w.offsets != nullptr) offset = b.At(w.offsets, b.batch.offsets)[token];
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      if (axis != 0 && !w.has_mrope) break;
      // Sums wrap around as they do in XLA.
      const uint32_t position = positions[axis * w.num_tokens + token] + offset;
      const int32_t row = static_cast<int32_t>(position);
      rows_[axis] = row < 0 ? 0 : row >= w.max_positions ? w.max_positions - 1 : row;
    }
  }

  // Cosine and sine of a pair of rotary dims, of the first or the second of them.
  JAX_ATTN_DEVICE void Load(int pair, int second, float& cos, float& sin) const {
    int column = pair;
    if (w_.full_width_table) {
      column = w_.interleaved ? 2 * pair + second : pair + second * (w_.rotary_dim / 2);
    }
    int row = rows_[0];
    if (w_.has_mrope) {
      const int axis = AxisOf(pair);
      row = axis == 0 ? row : axis == 1 ? rows_[1] : rows_[2];
    }
    const int64_t at = int64_t{row} * w_.table_width + column;
    cos = LoadElement(w_.cos, w_.cos_dtype, cos_ + at);
    sin = LoadElement(w_.sin, w_.sin_dtype, sin_ + at);
  }

  // The same of consecutive pairs.
  JAX_ATTN_DEVICE void LoadPiece(int pair, int second, float (&cos)[kPieceSize],
                                 float (&sin)[kPieceSize]) const {
    const int column = pair + (w_.full_width_table ? second * (w_.rotary_dim / 2) : 0);
    const int64_t at = int64_t{rows_[0]} * w_.table_width + column;
    LoadFloats(w_.cos, w_.cos_dtype, cos_ + at, cos);
    LoadFloats(w_.sin, w_.sin_dtype, sin_ + at, sin);
  }

 private:
  JAX_ATTN_DEVICE int AxisOf(int pair) const {
    if (w_.mrope_interleaved) {
      const int turn = pair % 3;
      return pair < 3 * (turn == 0 ? temporal_ : turn == 1 ? height_ : width_) ? turn : 0;
    }
    return pair < temporal_ ? 0 : pair < temporal_ + height_ ? 1 : 2;
  }

  const FusedQkvWork& w_;
  int64_t cos_;
  int64_t sin_;
  // Values, since a choice among parameters by address would move all of them to memory.
  int temporal_;
  int height_;
  int width_;
  int rows_[3] = {};
};

struct Factors {
  float own[2][kPieceSize];
  float other[2][kPieceSize];
  uint32_t rotated = 0;  // of dims that are not, `other` is no number; a bit for each
};

// Dims of rotary pairs, counted in the head.
struct RotaryDim {
  int pair = 0;
  int second = 0;
  int partner = 0;
  bool rotated = false;

  JAX_ATTN_DEVICE RotaryDim(const FusedQkvWork& w, const QkvPart& part, int dim) {
    const int i = dim - w.rotary_begin, half = w.rotary_dim / 2;
    rotated = part.rotated && i >= 0 && i < w.rotary_dim;
    second = w.interleaved ? i % 2 : i >= half;
    pair = w.interleaved ? i / 2 : second ? i - half : i;
    partner = dim + (w.interleaved ? 1 : half) * (second ? -1 : 1);
  }
};

// Weights of a piece of a head, offset included.
template <bool kBatched>
JAX_ATTN_DEVICE void LoadWeights(const FusedQkvWork& w, const QkvPart& part, QkvIndex<kBatched> b,
                                 const BatchStrides& strides, int64_t dim,
                                 float (&weights)[kPieceSize]) {
  LoadFloats(part.weight, part.weight_dtype, b.Offset(strides) + dim, weights);
#pragma unroll
  for (int i = 0; i < kPieceSize; ++i) weights[i] += w.weight_offset;
}

// The factors of a lane for a token. Weights that all heads share are part of them.
template <QkvKernel kKernel, bool kBatched>
JAX_ATTN_DEVICE void LoadFactors(const FusedQkvWork& w, const QkvPart& part, QkvIndex<kBatched> b,
                                 const BatchStrides& weight_strides, int token,
                                 const LanePieces& at, Factors& factors) {
  const int pieces[] = {at.first, at.second};
  const bool has[] = {at.has_first, at.has_second};
  float weights[2][kPieceSize];
  const bool weighted = part.weight != nullptr && !part.over_all_heads;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int i = 0; i < kPieceSize; ++i) weights[k][i] = 1.0f;
    if (weighted && has[k]) {
      LoadWeights(w, part, b, weight_strides, pieces[k] * kPieceSize, weights[k]);
    }
#pragma unroll
    for (int i = 0; i < kPieceSize; ++i) {
      factors.own[k][i] = weights[k][i];
      factors.other[k][i] = 0.0f;
    }
  }
  if (!part.rotated) return;
  const TableRows<kBatched> rows(w, b, token);
  if constexpr (kKernel == QkvKernel::kHalves) {
    if (!at.rotated) return;
    factors.rotated = 0xffffu;
    const int pair = pieces[0] * kPieceSize - w.rotary_begin;
    float cos[2][kPieceSize], sin[2][kPieceSize];
    if (w.has_mrope) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int i = 0; i < kPieceSize; ++i) rows.Load(pair + i, k, cos[k][i], sin[k][i]);
      }
    } else {
      rows.LoadPiece(pair, 0, cos[0], sin[0]);
      if (w.full_width_table) {
        rows.LoadPiece(pair, 1, cos[1], sin[1]);
      } else {
#pragma unroll
        for (int i = 0; i < kPieceSize; ++i) {
          cos[1][i] = cos[0][i];
          sin[1][i] = sin[0][i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPieceSize; ++i) {
      factors.own[0][i] = cos[0][i] * weights[0][i];
      factors.own[1][i] = cos[1][i] * weights[1][i];
      factors.other[0][i] = -sin[0][i] * weights[1][i];
      factors.other[1][i] = sin[1][i] * weights[0][i];
    }
  } else {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < kPieceSize; ++i) {
        const RotaryDim dim(FreshParameter(w), part, pieces[k] * kPieceSize + i);
        if (!dim.rotated || !has[k]) continue;
        factors.rotated |= 1u << (k * kPieceSize + i);
        float weight = weights[k][i ^ 1];
        if (kKernel == QkvKernel::kAnywhere && weighted) {
          weight = w.weight_offset + LoadElement(part.weight, part.weight_dtype,
                                                 b.Offset(weight_strides) + dim.partner);
        } else if (kKernel == QkvKernel::kAnywhere) {
          weight = 1.0f;
        }
        float cos, sin;
        rows.Load(dim.pair, dim.second, cos, sin);
        factors.own[k][i] *= cos;
        factors.other[k][i] = (dim.second ? sin : -sin) * weight;
      }
    }
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_FACTORS_H_
