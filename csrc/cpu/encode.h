// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// From float vectors back to storage. Like simd.h, for files that are compiled once per
// instruction set.

#ifndef JAX_ATTN_CSRC_CPU_ENCODE_H_
#define JAX_ATTN_CSRC_CPU_ENCODE_H_

#include "simd.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {

// kPair elements of 4, 2 and 1 bytes.
struct F32Pair {
  F32 low, high;
};
typedef uint16_t U16Pair __attribute__((vector_size(2 * kPair)));
typedef uint8_t U8Pair __attribute__((vector_size(kPair)));

// ---- Narrowing

template <int... kLane>
inline U16Pair Narrow16(U32 low, U32 high, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(reinterpret_cast<U16Pair>(low), reinterpret_cast<U16Pair>(high),
                                 (2 * kLane)...);
}

// The low halves of 32-bit words, whose high halves are 0.
inline U16Pair Narrow16(U32 low, U32 high) {
#if defined(__AVX512F__)
  const __m512i packed =
      _mm512_packus_epi32(reinterpret_cast<__m512i>(low), reinterpret_cast<__m512i>(high));
  const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  return reinterpret_cast<U16Pair>(_mm512_maskz_permutexvar_epi64(0xff, order, packed));
#elif defined(__AVX2__)
  const __m256i packed =
      _mm256_packus_epi32(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high));
  return reinterpret_cast<U16Pair>(_mm256_permute4x64_epi64(packed, 0xd8));
#else
  return Narrow16(low, high, std::make_integer_sequence<int, kPair>());
#endif
}

template <int... kLane>
inline U8Pair Narrow8(U16Pair words, std::integer_sequence<int, kLane...>) {
  typedef uint8_t Bytes __attribute__((vector_size(2 * kPair)));
  const Bytes bytes = reinterpret_cast<Bytes>(words);
  return __builtin_shufflevector(bytes, bytes, (2 * kLane)...);
}

// The low bytes of 32-bit words, whose other bytes are 0.
inline U8Pair Narrow8(U32 low, U32 high) {
  const U16Pair words = Narrow16(low, high);
#if defined(__AVX512BW__)
  return reinterpret_cast<U8Pair>(
      _mm512_maskz_cvtepi16_epi8(~0u, reinterpret_cast<__m512i>(words)));
#elif defined(__AVX2__)
  const __m256i packed = reinterpret_cast<__m256i>(words);
  return reinterpret_cast<U8Pair>(
      _mm_packus_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
#else
  return Narrow8(words, std::make_integer_sequence<int, kPair>());
#endif
}

// ---- Formats

inline I32 IsNan(F32 v) { return v != v; }
inline U32 SelectBits(I32 mask, U32 a, U32 b) { return mask ? a : b; }

// The second operand unless the first is less, or greater: also if one of them is a NaN. Compilers
// do not find these instructions by themselves.
inline F32 Least(F32 a, F32 b) {
#if defined(__AVX512F__)
  const auto x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  return reinterpret_cast<F32>(_mm512_maskz_min_ps(0xffff, x, y));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(
      _mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return Select(a < b, a, b);
#endif
}
inline F32 Greatest(F32 a, F32 b) {
#if defined(__AVX512F__)
  const auto x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  return reinterpret_cast<F32>(_mm512_maskz_max_ps(0xffff, x, y));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return Select(a > b, a, b);
#endif
}

// The lesser of each 16 bits.
inline U32 LeastHalves(U32 a, U32 b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<U32>(
      _mm512_min_epu16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<U32>(
      _mm256_min_epu16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  const U16Pair x = reinterpret_cast<U16Pair>(a), y = reinterpret_cast<U16Pair>(b);
  return reinterpret_cast<U32>(x < y ? x : y);
#endif
}

// Code of a finite magnitude that the format can hold, rounded to nearest even.
template <int kExponentBits, int kMantissaBits, int kBias>
inline U32 EncodeMagnitude(F32 magnitude) {
  constexpr int kDropped = 23 - kMantissaBits;
  constexpr uint32_t kLeastNormal = static_cast<uint32_t>(127 + 1 - kBias) << 23;
  // Subnormals have the step of the least normal numbers.
  const U32 power =
      AsBits(Greatest(AsFloat(AsBits(magnitude) & 0x7f800000u), AsFloat(U32{} + kLeastNormal)));
  // Adding this puts the step between neighbours in the last bit of a float32.
  const U32 shifter = power + (static_cast<uint32_t>(kDropped) << 23);
  const U32 steps = AsBits(magnitude + AsFloat(shifter)) - shifter;
  return steps + ((power - kLeastNormal) >> kDropped);
}

inline F32 Magnitude(F32 v) { return AsFloat(AsBits(v) & 0x7fffffffu); }
inline U32 SignAt(F32 v, int bit) { return (AsBits(v) >> 31) << bit; }
inline F32 AtMost(F32 v, float largest) { return Least(Broadcast(largest), v); }

// How rows of `Element` are decoded into floats in the order of memory, and encoded from them:
// rounding to nearest even. Quantised formats saturate.
template <DType kDType>
struct Format;

template <>
struct Format<DType::kFloat32> {
  using Element = float;
  using Packed = F32Pair;
  static void LoadPair(const Element* from, F32& a, F32& b) {
    Storage<DType::kFloat32>::LoadPair(from, a, b);
  }
  static Packed Pack(F32 a, F32 b) { return {a, b}; }
};

template <>
struct Format<DType::kBFloat16> {
  using Element = uint16_t;
  using Packed = U16Pair;
  static void LoadPair(const Element* from, F32& a, F32& b) {
    a = AsFloat(Widen(from) << 16);
    b = AsFloat(Widen(from + kLanes) << 16);
  }
  static U32 Encode(F32 v) {
    const U32 bits = AsBits(v);
    const U32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return SelectBits(IsNan(v), bits | 0x400000u, rounded) >> 16;
  }
  static Packed Pack(F32 a, F32 b) { return Narrow16(Encode(a), Encode(b)); }
};

template <>
struct Format<DType::kFloat16> {
  using Element = uint16_t;
  using Packed = U16Pair;
  static void LoadPair(const Element* from, F32& a, F32& b) {
    Storage<DType::kFloat16>::LoadPair(from, a, b);
  }
#if defined(__AVX512F__)
  static Packed Pack(F32 a, F32 b) {
    const auto half = [](F32 v) {
      return _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    };
    return reinterpret_cast<Packed>(
        _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(half(a)), half(b), 1));
  }
#elif defined(__F16C__)
  static Packed Pack(F32 a, F32 b) {
    return reinterpret_cast<Packed>(
        _mm256_set_m128i(_mm256_cvtps_ph(reinterpret_cast<__m256>(b), _MM_FROUND_TO_NEAREST_INT),
                         _mm256_cvtps_ph(reinterpret_cast<__m256>(a), _MM_FROUND_TO_NEAREST_INT)));
  }
#else
  // Infinities and NaN take the top exponent; all else is a finite magnitude that may round up to
  // infinity, whose code follows that of the largest number.
  static U32 Encode(F32 v) {
    const F32 magnitude = AtMost(Magnitude(v), 65536.0f);
    const U32 code = EncodeMagnitude<5, 10, 15>(magnitude);
    return SelectBits(IsNan(v), U32{} + 0x7e00u, code) | SignAt(v, 15);
  }
  static Packed Pack(F32 a, F32 b) { return Narrow16(Encode(a), Encode(b)); }
#endif
};

template <>
struct Format<DType::kInt8> {
  using Element = int8_t;
  using Packed = U8Pair;
  static constexpr float kLargest = 127.0f;
  // NaN becomes 0.
  static F32 NumberAtMost127(F32 v) { return AtMost(Select(v == v, v, F32{}), kLargest); }
  // Conversions saturate at the lower end: integers of 32 bits, and then bytes.
#if defined(__AVX512BW__)
  static Packed Pack(F32 a, F32 b) {
    const auto bytes = [](F32 v) {
      const auto number = reinterpret_cast<__m512>(NumberAtMost127(v));
      return _mm512_maskz_cvtsepi32_epi8(0xffff, _mm512_maskz_cvtps_epi32(0xffff, number));
    };
    return reinterpret_cast<Packed>(_mm256_set_m128i(bytes(b), bytes(a)));
  }
#elif defined(__AVX2__)
  static Packed Pack(F32 a, F32 b) {
    const auto integers = [](F32 v) {
      return _mm256_cvtps_epi32(reinterpret_cast<__m256>(NumberAtMost127(v)));
    };
    const __m256i words =  // in order
        _mm256_permute4x64_epi64(_mm256_packs_epi32(integers(a), integers(b)), 0xd8);
    return reinterpret_cast<Packed>(
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
#else
  // Adding 1.5 * 2^23 rounds to an integer in the low bits.
  static U32 Encode(F32 v) {
    return AsBits(Greatest(Broadcast(-128.0f), NumberAtMost127(v)) + 12582912.0f) & 0xffu;
  }
  static Packed Pack(F32 a, F32 b) { return Narrow8(Encode(a), Encode(b)); }
#endif
};

template <int kExponentBits, int kMantissaBits, int kBias, int kNan, bool kNegativeZero>
struct Float8Format {
  using Element = uint8_t;
  using Packed = U8Pair;
  static U32 Encode(F32 v, float largest) {
    const U32 code =
        EncodeMagnitude<kExponentBits, kMantissaBits, kBias>(AtMost(Magnitude(v), largest));
    U32 sign = SignAt(v, 7);
    if (!kNegativeZero) sign = SelectBits(code == 0u, U32{}, sign);
    return SelectBits(IsNan(v), U32{} + kNan, code | sign);
  }
};

template <>
struct Format<DType::kFloat8E4M3FN> : Float8Format<4, 3, 7, 0x7f, true> {
  static constexpr float kLargest = 448.0f;
  static Packed Pack(F32 a, F32 b) { return Narrow8(Encode(a, kLargest), Encode(b, kLargest)); }
};

template <>
struct Format<DType::kFloat8E4M3FNUZ> : Float8Format<4, 3, 8, 0x80, false> {
  static constexpr float kLargest = 240.0f;
  static Packed Pack(F32 a, F32 b) { return Narrow8(Encode(a, kLargest), Encode(b, kLargest)); }
};

template <>
struct Format<DType::kFloat8E5M2> : Float8Format<5, 2, 15, 0x7e, true> {
  static constexpr float kLargest = 57344.0f;
  static Packed Pack(F32 a, F32 b) { return Narrow8(Encode(a, kLargest), Encode(b, kLargest)); }
};

template <bool kAround>
inline void StoreVector(void* to, F32Pair pair) {
  StoreVector<kAround>(to, pair.low);
  StoreVector<kAround>(static_cast<float*>(to) + kLanes, pair.high);
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_ENCODE_H_
