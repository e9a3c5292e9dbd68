// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Teams of lanes: a head of a token at a time, 16 bytes of it or a few times as much in each lane.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_TEAM_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_TEAM_H_

#include <cstdint>

#include "elements.h"

namespace jax_attn::gpu {

// Keys whose products with a row are summed over the lanes of a team together. Afterwards lane i
// has the sum of key i % 4 of the four, and so have three, seven or fifteen others; what follows
// is done by each for its key.
inline constexpr int kChunk = 4;

// The sum over the four lanes that have different keys of a chunk.
JAX_ATTN_DEVICE float SumOfChunk(float x) {
  x += ShuffleXor(x, 1);
  return x + ShuffleXor(x, 2);
}

JAX_ATTN_DEVICE float MaxOfChunk(float x) {
  x = Max(x, ShuffleXor(x, 1));
  return Max(x, ShuffleXor(x, 2));
}

// What the lane that has key `i` of a chunk holds.
JAX_ATTN_DEVICE float OfKey(float x, int i) { return Broadcast(x, (Lane() & ~(kChunk - 1)) + i); }

template <DType kType, int kLanesOfTeam, int kPiecesOfLane>
struct Team {
  static constexpr DType kDType = kType;
  static constexpr int kLanes = kLanesOfTeam;
  static constexpr int kPieces = kPiecesOfLane;
  static constexpr int kSize = static_cast<int>(SizeOf(kType));
  static constexpr int kPerPiece = 16 / kSize;
  static constexpr int kElements = kPieces * kPerPiece;  // of a head in a lane

  // A lane's part of a head, as it is stored.
  struct Part {
    uint4 pieces[kPieces];
  };

  JAX_ATTN_DEVICE static int LaneOfTeam() {
    return FreshOfLane(static_cast<int>(threadIdx.x)) % kLanes;
  }
  JAX_ATTN_DEVICE static int Element(int piece) {
    return (piece * kLanes + LaneOfTeam()) * kPerPiece;
  }

  // The lane's part of a head of `dim` elements; zeros if the head is not wanted.
  JAX_ATTN_DEVICE static Part Load(const char* head, int dim, bool wanted) {
    Part part;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      part.pieces[i] = LoadIf(wanted && Element(i) < dim, head + Element(i) * kSize);
    }
    return part;
  }

  JAX_ATTN_DEVICE static void Unpack(const Part& part, float* x) {
    constexpr int kPerWord = 4 / kSize;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t words[4] = {part.pieces[i].x, part.pieces[i].y, part.pieces[i].z,
                                 part.pieces[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        ToFloats<kDType>(words[w], x + i * kPerPiece + w * kPerWord);
      }
    }
  }

  // Stores `factor * x`, rounded once.
  JAX_ATTN_DEVICE static void Store(char* head, int dim, float factor, const float* x) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (kDType == DType::kFloat32) {
          words[w] = FloatBits(factor * x[i * 4 + w]);
        } else {
          const float* pair = x + i * 8 + w * 2;
          words[w] = Pack<kDType>(factor * pair[0], factor * pair[1]);
        }
      }
      if (Element(i) < dim) {
        *reinterpret_cast<uint4*>(head + Element(i) * kSize) = {words[0], words[1], words[2],
                                                                words[3]};
      }
    }
  }

  JAX_ATTN_DEVICE static void StoreZeros(char* head, int dim) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (Element(i) < dim) *reinterpret_cast<uint4*>(head + Element(i) * kSize) = {0, 0, 0, 0};
    }
  }

  // The lane's part of a dot product.
  JAX_ATTN_DEVICE static float Multiply(const float* x, const Part& part) {
    float y[kElements], sum = 0;
    Unpack(part, y);
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum += x[i] * y[i];
    return sum;
  }

  JAX_ATTN_DEVICE static void Add(float factor, const Part& part, float* sum) {
    float x[kElements];
    Unpack(part, x);
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum[i] += factor * x[i];
  }

  JAX_ATTN_DEVICE static void Clear(float* x) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = 0;
  }

  // Sums over the team, of two or four keys at once: each of the first steps halves what is summed,
  // so that four sums cost little more than one.
  template <int kKeys>
  JAX_ATTN_DEVICE static float SumOverTeam(const float (&x)[kKeys]) {
    static_assert(kKeys == 2 || kKeys == kChunk);
    const bool odd = Lane() & 1, high = Lane() & 2;
    float sum = (odd ? x[1] : x[0]) + ShuffleXor(odd ? x[0] : x[1], 1);
    if constexpr (kKeys == kChunk) {
      const float other = (odd ? x[3] : x[2]) + ShuffleXor(odd ? x[2] : x[3], 1);
      sum = (high ? other : sum) + ShuffleXor(high ? sum : other, 2);
    }
#pragma unroll
    for (int mask = kKeys; mask < kLanes; mask *= 2) sum += ShuffleXor(sum, mask);
    return sum;
  }
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_TEAM_H_
