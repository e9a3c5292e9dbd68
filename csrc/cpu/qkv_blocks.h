// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Norm and rotation of heads that consist of whole blocks, a block being a pair of vectors: each
// element is loaded, computed and stored without a detour through memory.

#ifndef JAX_ATTN_CSRC_CPU_QKV_BLOCKS_H_
#define JAX_ATTN_CSRC_CPU_QKV_BLOCKS_H_

#include "qkv_rotation.h"
#include "qkv_rows.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

// How a block travels between storage and two vectors. Pack may spoil a NaN, which the caller
// must look for if kSpoilsNan.
template <DType kDType>
struct Block : Format<kDType> {
  static constexpr bool kInterleaved = false;
  static constexpr bool kSpoilsNan = false;
};

// As in Storage: one vector has the even elements, the other the odd ones. Rounding takes less
// than half the operations without the special case.
template <>
struct Block<DType::kBFloat16> {
  using Element = uint16_t;
  using Packed = U32;
  static constexpr bool kInterleaved = true;
  static constexpr bool kSpoilsNan = true;
  static void LoadPair(const Element* from, F32& a, F32& b) {
    Storage<DType::kBFloat16>::LoadPair(from, a, b);
  }
  static U32 Round(F32 v) {
    const U32 bits = AsBits(v);
#if defined(__AVX512F__)
    // One instruction fewer than by shifts.
    const __m512i low = reinterpret_cast<__m512i>(bits + 0x7fffu);
    const __mmask16 odd =
        _mm512_test_epi32_mask(reinterpret_cast<__m512i>(bits), _mm512_set1_epi32(0x10000));
    return reinterpret_cast<U32>(_mm512_mask_sub_epi32(low, odd, low, _mm512_set1_epi32(-1)));
#else
    return bits + (((bits >> 16) & 1u) + 0x7fffu);
#endif
  }
  static Packed Pack(F32 a, F32 b) {
    const U32 even = Round(a) >> 16, odd = Round(b);
#if defined(__AVX2__) && !defined(__AVX512F__)
    return reinterpret_cast<U32>(
        _mm256_blend_epi16(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(odd), 0xaa));
#else
    return even | (odd & 0xffff0000u);
#endif
  }
};

template <int... kLane>
inline F32 EveryOther(F32 a, F32 b, int, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane)...);
}
template <int... kLane>
inline F32 EveryOther(F32 a, F32 b, char, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}

// Puts factors of `n` consecutive elements in the order in which blocks are loaded.
template <DType kDType>
void Arrange(const float* from, int64_t n, float* to) {
  constexpr auto kSequence = std::make_integer_sequence<int, kLanes>();
  for (int64_t i = 0; i < n; i += kPair) {
    F32 a = Load(from + i), b = Load(from + i + kLanes);
    if constexpr (Block<kDType>::kInterleaved) {
      const F32 even = EveryOther(a, b, int{0}, kSequence);
      b = EveryOther(a, b, char{0}, kSequence);
      a = even;
    }
    Store(to + i, a);
    Store(to + i + kLanes, b);
  }
}

// y[i] = inverse * (x[i] * own[i] + x[partner of i] * other[i]), arranged; weights of the norm
// included.
struct Factors {
  Head own;
  Head other;
};

// The rotary dims of a head, and how they form pairs.
struct RotarySpan {
  int64_t begin = 0;
  int64_t size = 0;
  bool neighbours = false;

  bool IsWholeBlocks() const {
    return begin % kPair == 0 && (neighbours ? size : size / 2) % kPair == 0;
  }
};

// Factors of the rotary dims of a token. `weight` may be null.
template <DType kDType>
void RotateFactors(const Angles& angles, const RotarySpan& span, const float* weight,
                   Factors& factors) {
  const float *cos = angles.cos.values, *sin = angles.sin.values;
  float* const own = factors.own.values + span.begin;
  float* const other = factors.other.values + span.begin;
  if (weight == nullptr) {
    Arrange<kDType>(cos, span.size, own);
    Arrange<kDType>(sin, span.size, other);
    return;
  }
  Head weighted[2];
  const float* const w = weight + span.begin;
  const int64_t half = span.size / 2;
  for (int64_t i = 0; i < span.size; i += kLanes) {
    Store(weighted[0].values + i, Load(cos + i) * Load(w + i));
    const F32 partner =
        span.neighbours ? Neighbours(Load(w + i)) : Load(w + (i < half ? i + half : i - half));
    Store(weighted[1].values + i, Load(sin + i) * partner);
  }
  Arrange<kDType>(weighted[0].values, span.size, own);
  Arrange<kDType>(weighted[1].values, span.size, other);
}

template <DType kDType>
float SumSquaresOfRow(const typename Block<kDType>::Element* row, int64_t n) {
  F32 sums[2] = {};
  for (int64_t i = 0; i < n; i += kPair) {
    F32 a, b;
    Block<kDType>::LoadPair(row + i, a, b);
    sums[0] += a * a;
    sums[1] += b * b;
  }
  return Sum(sums[0] + sums[1]);
}

// Two blocks that are rotated with each other.
struct TurnedBlocks {
  F32 first[2], second[2];
};

// Of the blocks at elements `i` and `j` of a row.
template <typename B>
inline TurnedBlocks TurnBlocks(const typename B::Element* x, int64_t i, int64_t j, float inverse,
                               const Factors& factors) {
  const float *own = factors.own.values, *other = factors.other.values;
  F32 a, b, c, d;
  B::LoadPair(x + i, a, b);
  B::LoadPair(x + j, c, d);
  a *= inverse;
  b *= inverse;
  c *= inverse;
  d *= inverse;
  return {{a * Load(own + i) + c * Load(other + i),
           b * Load(own + i + kLanes) + d * Load(other + i + kLanes)},
          {c * Load(own + j) + a * Load(other + j),
           d * Load(own + j + kLanes) + b * Load(other + j + kLanes)}};
}

// Computes a row; false if it may have a NaN that storing has spoiled, since the sum of its
// elements is one, as it also is with both infinities.
template <DType kDType>
bool ComputeBlocks(const typename Block<kDType>::Element* x, int64_t n, float inverse,
                   const Factors& factors, RotarySpan span, typename Block<kDType>::Element* to) {
  using B = Block<kDType>;
  const float *own = factors.own.values, *other = factors.other.values;
  F32 sum = {};
  const auto write = [&](int64_t i, F32 a, F32 b) {
    if constexpr (B::kSpoilsNan) sum += a + b;
    StoreVector<false>(to + i, B::Pack(a, b));
  };
  const auto keep = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kPair) {
      F32 a, b;
      B::LoadPair(x + i, a, b);
      write(i, a * inverse * Load(own + i), b * inverse * Load(own + i + kLanes));
    }
  };
  const int64_t end = span.begin + span.size, half = span.size / 2;
  keep(0, span.begin);
  if (span.neighbours) {
    for (int64_t i = span.begin; i < end; i += kPair) {
      F32 a, b;
      B::LoadPair(x + i, a, b);
      a *= inverse;
      b *= inverse;
      const F32 a_partner = B::kInterleaved ? b : Neighbours(a);
      const F32 b_partner = B::kInterleaved ? a : Neighbours(b);
      write(i, a * Load(own + i) + a_partner * Load(other + i),
            b * Load(own + i + kLanes) + b_partner * Load(other + i + kLanes));
    }
  } else {
    for (int64_t i = span.begin; i < span.begin + half; i += kPair) {
      const int64_t j = i + half;
      const TurnedBlocks turned = TurnBlocks<B>(x, i, j, inverse, factors);
      write(i, turned.first[0], turned.first[1]);
      write(j, turned.second[0], turned.second[1]);
    }
  }
  keep(end, n);
  return !(B::kSpoilsNan && Any(IsNan(sum)));
}

}  // namespace
}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_QKV_BLOCKS_H_
