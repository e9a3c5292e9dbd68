// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The arithmetic of a head in plain kernels, of which a lane has two pieces. All of them compute
// the same bits.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_HEAD_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_HEAD_H_

#include <cstdint>

#include "fused_qkv_rows.h"

namespace jax_attn::gpu {

// The two pieces of lane `lane` of a head. `rotated_slots` lanes have the pairs of a rotation;
// `other_slots` lanes have what is not rotated.
JAX_ATTN_DEVICE LanePieces PlainPieces(int lane, int rotated_slots, int other_slots,
                                       int num_pieces) {
  LanePieces at;
  at.rotated = lane < rotated_slots;
  at.first = lane + (at.rotated ? 0 : rotated_slots);
  at.second = at.first + (at.rotated ? rotated_slots : other_slots);
  at.has_first = lane < rotated_slots + other_slots;
  at.has_second = at.has_first && at.second < num_pieces;
  return at;
}

// y = (x * own + partner of x * other) * inverse of the norm.
template <int kSize>
struct HeadFactors {
  float own[2][kSize];
  float other[2][kSize];
};

// Factors in shared memory, where the lanes of all heads of a wave find them: in registers they
// would take the room of other waves.
template <int kSize>
class SharedFactors {
 public:
  // Bytes of a wave whose heads have 2^`lane_bits` lanes each.
  static constexpr int Bytes(int lane_bits) {
    return static_cast<int>(sizeof(HeadFactors<kSize>)) << lane_bits;
  }

  JAX_ATTN_DEVICE SharedFactors(char* shared, int lane_bits)
      : own_(reinterpret_cast<uint4*>(shared) + (Lane() & ((1 << lane_bits) - 1))),
        step_(1 << lane_bits),
        first_(Lane() >> lane_bits == 0) {}

  // Called by all lanes of the wave.
  JAX_ATTN_DEVICE void Store(const HeadFactors<kSize>& factors) const {
    uint4 vectors[kVectors];
    __builtin_memcpy(vectors, &factors, sizeof(factors));
    WaveFence();  // the last ones have been read
    if (first_) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) own_[i * step_] = vectors[i];
    }
    WaveFence();
  }
  JAX_ATTN_DEVICE void Load(HeadFactors<kSize>& factors) const {
    uint4 vectors[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i] = own_[i * step_];
    __builtin_memcpy(&factors, vectors, sizeof(factors));
  }

 private:
  static constexpr int kVectors = sizeof(HeadFactors<kSize>) / sizeof(uint4);

  uint4* own_;
  int step_;
  bool first_;
};

template <int kSize>
using TablePieces = Piece<DType::kFloat32, kSize>[2];  // cosines, sines

template <DType kDType, int kSize>
JAX_ATTN_DEVICE void MakeHeadFactors(const Piece<kDType, kSize> (&weights)[2], bool weighted,
                                     float weight_offset, const TablePieces<kSize>& tables,
                                     bool rotated, HeadFactors<kSize>& factors) {
  float cos[kSize], sin[kSize];
  tables[0].Decode(cos);
  tables[1].Decode(sin);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    weights[k].Decode(factors.own[k]);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      factors.own[k][i] = weighted ? factors.own[k][i] + weight_offset : 1.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    factors.other[0][i] = -sin[i] * factors.own[1][i];
    factors.other[1][i] = sin[i] * factors.own[0][i];
    if (rotated) factors.own[0][i] *= cos[i];
    if (rotated) factors.own[1][i] *= cos[i];
  }
}

// 1 over the root of the mean square of a head. All lanes of the wave call this.
template <int kSize>
JAX_ATTN_DEVICE float InverseNorm(const float (&x)[2][kSize], int lane_bits, float inverse_size,
                                  float epsilon) {
  // A tree over neighbours, in lanes and then across them: the same sums for pieces of any size.
  float sums[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) sums[i] = __builtin_fmaf(x[1][i], x[1][i], x[0][i] * x[0][i]);
#pragma unroll
  for (int half = 1; half < kSize; half *= 2) {
#pragma unroll
    for (int i = 0; i < kSize; i += 2 * half) sums[i] += sums[i + half];
  }
  float sum = sums[0];
#pragma unroll 1
  for (int mask = 1; mask >> lane_bits == 0; mask *= 2) sum += ShuffleXor(sum, mask);
  return InverseSqrt(__builtin_fmaf(sum, inverse_size, epsilon));
}

// Only a rotated partner may be multiplied, even by 0: it may be infinite.
template <int kSize>
JAX_ATTN_DEVICE void TurnHead(const float (&x)[2][kSize], const HeadFactors<kSize>& factors,
                              bool rotated, float inverse, float (&y)[2][kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    y[0][i] = x[0][i] * factors.own[0][i];
    y[1][i] = x[1][i] * factors.own[1][i];
    if (rotated) {
      y[0][i] = __builtin_fmaf(x[1][i], factors.other[0][i], y[0][i]);
      y[1][i] = __builtin_fmaf(x[0][i], factors.other[1][i], y[1][i]);
    }
    y[0][i] *= inverse;
    y[1][i] *= inverse;
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_HEAD_H_
