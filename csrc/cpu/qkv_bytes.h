// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Rows of bfloat16 to caches of 8 bits: as QuantizeTo of qkv_rows.h, in half the operations, for
// rows and scales that nothing unusual happens with.

#ifndef JAX_ATTN_CSRC_CPU_QKV_BYTES_H_
#define JAX_ATTN_CSRC_CPU_QKV_BYTES_H_

#include "qkv_rows.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

#if defined(__AVX2__) && defined(__FMA__)
// A bfloat16 in each half of its words.
constexpr uint32_t kMagnitudes = 0x7fff7fffu;

// For a vector of AVX-512, and the first for one of AVX2.
alignas(64) constexpr float kOddNumbers[16] = {1,  3,  5,  7,  9,  11, 13, 15,
                                               17, 19, 21, 23, 25, 27, 29, 31};

// The greater of each unsigned 16 bits.
inline U32 GreatestHalves(U32 a, U32 b) {
#if defined(__AVX512BW__)
  return reinterpret_cast<U32>(
      _mm512_max_epu16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  return reinterpret_cast<U32>(
      _mm256_max_epu16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
}

// Signed 16 bits to signed 8, saturating; in order.
inline U32 PackHalves(U32 a, U32 b) {
#if defined(__AVX512BW__)
  const __m512i packed =
      _mm512_packs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  return reinterpret_cast<U32>(_mm512_maskz_permutexvar_epi64(0xff, order, packed));
#else
  const __m256i packed =
      _mm256_packs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return reinterpret_cast<U32>(_mm256_permute4x64_epi64(packed, 0xd8));
#endif
}

// a * b + c, rounded once. Of a sum of two products a compiler chooses which one is not rounded.
inline F32 Fused(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#else
  return reinterpret_cast<F32>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#endif
}

// Quotients by a scale, as good as those of a division where the dividend has 8 bits: they are on
// the same side of each number that bytes are rounded at. The reciprocal has 48 bits.
class ShortDivisor {
 public:
  ShortDivisor(float scale, float unit) {
    const float inverse = 1.0f / scale;
    high_ = Broadcast(inverse * unit);
    low_ = Broadcast(__builtin_fmaf(-scale, inverse, 1.0f) * inverse * unit);
  }
  // Not where parts of the reciprocal may be subnormal, and the one mantissa that is an exception,
  // found by trying all.
  static bool CanDivide(float scale) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof(bits));
    return scale > 1e-18f && scale < 1e18f && (bits & 0x7fffffu) != 0x7fffffu;
  }

  F32 Divide(F32 x) const { return Fused(x, high_, x * low_); }
  // A few units in the last place off.
  F32 DivideRoughly(F32 x) const { return x * high_; }

 private:
  F32 high_;
  F32 low_;
};

// How two vectors of bfloat16 become one of bytes. kReach: the quotients' magnitudes that are
// allowed. kRough: for scales of which IsRough() says that it will do.
template <DType kTo>
struct Bytes;

template <>
struct Bytes<DType::kInt8> {
  static constexpr float kUnit = 1;
  static constexpr float kReach = 16384;
  static bool IsRough(float) { return false; }  // takes longer to find out than it saves

  template <bool kRough>
  static U32 Pack(U32 first, U32 second, const ShortDivisor& divisor) {
    return PackHalves(Integers(first, divisor), Integers(second, divisor));
  }

 private:
  // Adding 1.5 * 2^23 rounds to an integer in the low bits.
  static U32 Integers(U32 words, const ShortDivisor& divisor) {
    const U32 even = AsBits(divisor.Divide(AsFloat(words << 16)) + 12582912.0f);
    const U32 odd = AsBits(divisor.Divide(AsFloat(words & 0xffff0000u)) + 12582912.0f) << 16;
#if defined(__AVX512F__)
    return (even & 0xffffu) | odd;
#else
    return reinterpret_cast<U32>(
        _mm256_blend_epi16(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(odd), 0xaa));
#endif
  }
};

// Quotients are scaled so that the exponents are those of float16, of which only the lower half
// occurs, and the least normal number is that of float16, and so is the step between subnormal
// ones. What remains is to round to the bits of the mantissa that are kept.
template <DType kTo, int kMantissaBits, int kBias>
struct Float8Bytes {
  static constexpr float kUnit = 1.0f / static_cast<float>(1 << (15 - kBias));
  static constexpr float kReach = 1e15f;

  // Whether all quotients of bfloat16 by the scale are far from halves between neighbours: then it
  // does not matter if they are a little off, or how halves are rounded.
  static bool IsRough(float scale) {
    constexpr int kHalves = 1 << (kMantissaBits + 1);  // odd numbers, up to powers of 2
    I32 near = {};
    for (int first = 0; first < kHalves; first += kLanes) {
      const U32 halves = AsBits(Load(kOddNumbers + first) * scale);
      near |= reinterpret_cast<I32>(((halves + 16u) & 0xffffu) <= 32u);
    }
    return !Any(near);
  }

  template <bool kRough>
  static U32 Pack(U32 first, U32 second, const ShortDivisor& divisor) {
    const U32 a = first & kMagnitudes, b = second & kMagnitudes;
    const U16Pair even = Codes<kRough>(AsFloat(a << 16), AsFloat(b << 16), divisor);
    const U16Pair odd = Codes<kRough>(AsFloat(a & 0xffff0000u), AsFloat(b & 0xffff0000u), divisor);
    const U32 codes = reinterpret_cast<U32>(
        (even >> kDropped) | ((odd << (8 - kDropped)) & static_cast<uint16_t>(0xff00)));
    U32 signs = PackHalves(first, second) & 0x80808080u;
    if constexpr (kTo == DType::kFloat8E4M3FNUZ) {  // has no negative zero
      typedef uint8_t EachByte __attribute__((vector_size(sizeof(U32))));
      signs &= ~reinterpret_cast<U32>(reinterpret_cast<EachByte>(codes) == 0);
    }
    return codes | signs;
  }

 private:
  static constexpr int kDropped = 10 - kMantissaBits;
  static constexpr int kLargestCode = kTo == DType::kFloat8E4M3FN     ? 0x7e
                                      : kTo == DType::kFloat8E4M3FNUZ ? 0x7f
                                                                      : 0x7b;

  // Codes in the upper bits of float16.
  template <bool kRough>
  static U16Pair Codes(F32 a, F32 b, const ShortDivisor& divisor) {
    U16Pair bits;
    if constexpr (kRough) {
      const uint16_t half = 1 << (kDropped - 1);
      bits = Truncate(divisor.DivideRoughly(a), divisor.DivideRoughly(b)) + half;
    } else {
      bits = Format<DType::kFloat16>::Pack(Round(divisor.Divide(a)), Round(divisor.Divide(b)));
    }
    constexpr uint16_t kLargest = ((kLargestCode + 1) << kDropped) - 1;
    return reinterpret_cast<U16Pair>(
        LeastHalves(reinterpret_cast<U32>(bits), reinterpret_cast<U32>(U16Pair{} + kLargest)));
  }

  static F32 Round(F32 v) {
    // Subnormals have the step of the least normal numbers. Adding 1.5 * 2^(23 - kMantissaBits)
    // times its power of 2 puts the step in the last bit of a float32.
    const F32 power = Greatest(AsFloat(AsBits(v) & 0x7f800000u), Broadcast(0x1p-14f));
    constexpr float kShifter = 1.5f * static_cast<float>(1 << (23 - kMantissaBits));
    return (power * kShifter + v) - power * kShifter;
  }

  // float16, rounded to zero.
  static U16Pair Truncate(F32 a, F32 b) {
#if defined(__AVX512F__)
    const auto half = [](F32 v) {
      return _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_ZERO);
    };
    return reinterpret_cast<U16Pair>(
        _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(half(a)), half(b), 1));
#else
    return reinterpret_cast<U16Pair>(
        _mm256_set_m128i(_mm256_cvtps_ph(reinterpret_cast<__m256>(b), _MM_FROUND_TO_ZERO),
                         _mm256_cvtps_ph(reinterpret_cast<__m256>(a), _MM_FROUND_TO_ZERO)));
#endif
  }
};

template <>
struct Bytes<DType::kFloat8E4M3FN> : Float8Bytes<DType::kFloat8E4M3FN, 3, 7> {};
template <>
struct Bytes<DType::kFloat8E4M3FNUZ> : Float8Bytes<DType::kFloat8E4M3FNUZ, 3, 8> {};
template <>
struct Bytes<DType::kFloat8E5M2> : Float8Bytes<DType::kFloat8E5M2, 2, 15> {};

template <DType kTo, bool kStream, bool kRough>
inline void QuantizeHead(const uint16_t* row, int64_t n, const ShortDivisor& divisor, char* to) {
  for (int64_t i = 0; i < n; i += 2 * kPair) {
    const U32 first = LoadAs<U32>(row + i), second = LoadAs<U32>(row + i + kPair);
    StoreVector<kStream>(to + i, Bytes<kTo>::template Pack<kRough>(first, second, divisor));
  }
}

// Stores heads in the cache until one is met that this is not for; returns how many.
template <DType kTo, bool kStream>
__attribute__((noinline)) int64_t QuantizeHeads(const char* from, int64_t stride, int64_t count,
                                                int64_t n, Place& place) {
  using To = Bytes<kTo>;
  for (int64_t head = 0; head < count; ++head, place.Next()) {
    const auto* const row = reinterpret_cast<const uint16_t*>(from + head * stride);
    U32 largest = {};
    for (int64_t i = 0; i < n; i += kPair) {
      largest = GreatestHalves(largest, LoadAs<U32>(row + i) & kMagnitudes);
    }
    const F32 tops = AsFloat(GreatestHalves(largest & 0xffff0000u, largest << 16));
    float scale = place.scale == nullptr ? 1.0f : *place.scale;
    if (place.dynamic_scale != nullptr) {
      scale = ScaleOfLargest(MaxLane(tops), Format<kTo>::kLargest);
    }
    if (!ShortDivisor::CanDivide(scale) || Any(~(tops <= To::kReach * scale))) return head;
    if (place.dynamic_scale != nullptr) *place.dynamic_scale = scale;
    const ShortDivisor divisor(scale, To::kUnit);
    if (To::IsRough(scale)) {
      QuantizeHead<kTo, kStream, true>(row, n, divisor, place.row);
    } else {
      QuantizeHead<kTo, kStream, false>(row, n, divisor, place.row);
    }
  }
  return count;
}

template <DType kTo>
int64_t QuantizeHeads(const char* from, int64_t stride, int64_t count, int64_t n, bool stream,
                      Place& place) {
  if (stream) return QuantizeHeads<kTo, true>(from, stride, count, n, place);
  return QuantizeHeads<kTo, false>(from, stride, count, n, place);
}

inline int64_t QuantizeHeads(const char* from, int64_t stride, int64_t count, int64_t n,
                             DType dtype, bool stream, Place& place) {
  if (n % (2 * kPair) != 0) return 0;
  stream = stream && CanStream(place.row, n) && place.row_stride % 64 == 0;
  switch (dtype) {
    case DType::kInt8:
      return QuantizeHeads<DType::kInt8>(from, stride, count, n, stream, place);
    case DType::kFloat8E4M3FN:
      return QuantizeHeads<DType::kFloat8E4M3FN>(from, stride, count, n, stream, place);
    case DType::kFloat8E4M3FNUZ:
      return QuantizeHeads<DType::kFloat8E4M3FNUZ>(from, stride, count, n, stream, place);
    case DType::kFloat8E5M2:
      return QuantizeHeads<DType::kFloat8E5M2>(from, stride, count, n, stream, place);
    default:
      return 0;
  }
}
#else
inline int64_t QuantizeHeads(const char*, int64_t, int64_t, int64_t, DType, bool, Place&) {
  return 0;
}
#endif

}  // namespace
}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_QKV_BYTES_H_
