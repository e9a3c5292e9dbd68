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
// must look for if kSpoilsNan; PackAny does not.
template <DType kDType>
struct Block : Format<kDType> {
  static constexpr bool kInterleaved = false;
  static constexpr bool kSpoilsNan = false;
  static typename Format<kDType>::Packed PackAny(F32 a, F32 b) {
    return Format<kDType>::Pack(a, b);
  }
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
  static Packed Pack(F32 a, F32 b) { return Join(Round(a), Round(b)); }
  static Packed PackAny(F32 a, F32 b) {
    using F = Format<DType::kBFloat16>;
    return F::Encode(a) | F::Encode(b) << 16;
  }
  // Rounds halves up, not to even, in half the operations. A half leaves 16 bits of 0, of which
  // the least are kept in the lower part of `least`.
  static Packed PackHalvesUp(F32 a, F32 b, U32& least) {
    const U32 even = AsBits(a) + 0x8000u, odd = AsBits(b) + 0x8000u;
    least = LeastHalves(least, LeastHalves(even, odd));
    return Join(even, odd);
  }
  static bool SawHalves(U32 least) {
#if defined(__AVX512F__)
    return _mm512_testn_epi32_mask(reinterpret_cast<__m512i>(least), _mm512_set1_epi32(0xffff));
#else
    return Any(least << 16 == 0u);
#endif
  }

 private:
  // The upper halves of words.
  static Packed Join(U32 even, U32 odd) {
    even >>= 16;
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

  F32 Own(int64_t i) const { return Load(own.values + i); }
  F32 Other(int64_t i) const { return Load(other.values + i); }
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

// The angles of a token as factors.
template <DType kDType>
void ArrangeAngles(const Angles& angles, int64_t rotary_dim, Factors& turns) {
  Arrange<kDType>(angles.cos.values, rotary_dim, turns.own.values);
  Arrange<kDType>(angles.sin.values, rotary_dim, turns.other.values);
}

// The weights of the rotary dims: of each element, and of its partner.
template <DType kDType>
void ArrangeWeights(const float* weight, const RotarySpan& span, Factors& weights) {
  const float* const own = weight + span.begin;
  const int64_t half = span.size / 2;
  Head other;
  for (int64_t i = 0; i < span.size; ++i) {
    other.values[i] = own[span.neighbours ? i ^ 1 : i < half ? i + half : i - half];
  }
  Arrange<kDType>(own, span.size, weights.own.values);
  Arrange<kDType>(other.values, span.size, weights.other.values);
}

// Factors of the rotary dims of a token.
inline void WeighTurns(const Factors& turns, const Factors& weights, const RotarySpan& span,
                       Factors& factors) {
  for (int64_t i = 0; i < span.size; i += kLanes) {
    Store(factors.own.values + span.begin + i, turns.Own(i) * weights.Own(i));
    Store(factors.other.values + span.begin + i, turns.Other(i) * weights.Other(i));
  }
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
template <typename B, typename F>
inline TurnedBlocks TurnBlocks(const typename B::Element* x, int64_t i, int64_t j, float inverse,
                               const F& factors) {
  F32 a, b, c, d;
  B::LoadPair(x + i, a, b);
  B::LoadPair(x + j, c, d);
  a *= inverse;
  b *= inverse;
  c *= inverse;
  d *= inverse;
  return {{a * factors.Own(i) + c * factors.Other(i),
           b * factors.Own(i + kLanes) + d * factors.Other(i + kLanes)},
          {c * factors.Own(j) + a * factors.Other(j),
           d * factors.Own(j + kLanes) + b * factors.Other(j + kLanes)}};
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
