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

// How two vectors of bfloat16 become one of bytes. kReach: the quotients' magnitudes that are
// allowed.
template <DType kTo>
struct Bytes;

template <>
struct Bytes<DType::kInt8> {
  static constexpr float kUnit = 1;
  static constexpr float kReach = 16384;

  template <typename Divide>
  static U32 Pack(U32 first, U32 second, Divide divide) {
    return PackHalves(Integers(first, divide), Integers(second, divide));
  }

 private:
  // Adding 1.5 * 2^23 rounds to an integer in the low bits.
  template <typename Divide>
  static U32 Integers(U32 words, Divide divide) {
    const U32 even = AsBits(divide(AsFloat(words << 16)) + 12582912.0f);
    const U32 odd = AsBits(divide(AsFloat(words & 0xffff0000u)) + 12582912.0f) << 16;
#if defined(__AVX512F__)
    return (even & 0xffffu) | odd;
#else
    return reinterpret_cast<U32>(
        _mm256_blend_epi16(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(odd), 0xaa));
#endif
  }
};

// Quotients are scaled so that the exponents are those of float16, of which only the lower half
// occurs: what remains is to round to the bits of the mantissa that are kept. The least normal
// number is that of float16 then, and so is the step between subnormal ones.
template <DType kTo, int kMantissaBits, int kBias>
struct Float8Bytes {
  static constexpr float kUnit = 1.0f / static_cast<float>(1 << (15 - kBias));
  static constexpr float kReach = 1e15f;

  template <typename Divide>
  static U32 Pack(U32 first, U32 second, Divide divide) {
    const U32 a = first & kMagnitudes, b = second & kMagnitudes;
    const U16Pair even = Halves(Round(divide(AsFloat(a << 16))), Round(divide(AsFloat(b << 16))));
    const U16Pair odd =
        Halves(Round(divide(AsFloat(a & 0xffff0000u))), Round(divide(AsFloat(b & 0xffff0000u))));
    const U32 codes = reinterpret_cast<U32>((even >> kDropped) | (odd << (8 - kDropped)));
    U32 signs = PackHalves(first, second) & 0x80808080u;
    if constexpr (kTo == DType::kFloat8E4M3FNUZ) {  // has no negative zero
      typedef uint8_t Codes __attribute__((vector_size(sizeof(U32))));
      signs &= ~reinterpret_cast<U32>(reinterpret_cast<Codes>(codes) == 0);
    }
    return codes | signs;
  }

 private:
  static constexpr int kDropped = 10 - kMantissaBits;

  static F32 Round(F32 v) {
    // Subnormals have the step of the least normal numbers. Adding 1.5 * 2^(23 - kMantissaBits)
    // times its power of 2 puts the step in the last bit of a float32.
    const F32 power = Greatest(AsFloat(AsBits(v) & 0x7f800000u), Broadcast(0x1p-14f));
    constexpr float kShifter = 1.5f * static_cast<float>(1 << (23 - kMantissaBits));
    return (power * kShifter + v) - power * kShifter;
  }

  static U16Pair Halves(F32 a, F32 b) {
    constexpr float kLargest = Format<kTo>::kLargest * kUnit;
    const U16Pair largest = U16Pair{} + HalfOf(kLargest);
    const U16Pair bits = Format<DType::kFloat16>::Pack(a, b);
    return reinterpret_cast<U16Pair>(
        LeastHalves(reinterpret_cast<U32>(bits), reinterpret_cast<U32>(largest)));
  }

  // The bits of a normal float16.
  static constexpr uint16_t HalfOf(float v) {
    int exponent = 15;
    for (; v >= 2; v /= 2) ++exponent;
    return static_cast<uint16_t>(exponent << 10 | static_cast<int>((v - 1) * 1024));
  }
};

template <>
struct Bytes<DType::kFloat8E4M3FN> : Float8Bytes<DType::kFloat8E4M3FN, 3, 7> {};
template <>
struct Bytes<DType::kFloat8E4M3FNUZ> : Float8Bytes<DType::kFloat8E4M3FNUZ, 3, 8> {};
template <>
struct Bytes<DType::kFloat8E5M2> : Float8Bytes<DType::kFloat8E5M2, 2, 15> {};

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

  F32 operator()(F32 x) const { return x * high_ + x * low_; }

 private:
  F32 high_;
  F32 low_;
};

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
    for (int64_t i = 0; i < n; i += 2 * kPair) {
      StoreVector<kStream>(place.row + i,
                           To::Pack(LoadAs<U32>(row + i), LoadAs<U32>(row + i + kPair), divisor));
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
